"""How runs compare with their baselines, and what that says to the paper's statements."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import pandas as pd

from pgt_diag.text import printable
from reports.layouts import is_batch_normalised
from reports.summary import RunSummary, can_revive
from reports.tables import interval95, paired_differences, runs_table
from reports.text import METHOD_NAMES, join, number, plural

Judgement = Literal["agrees", "contradicts", "leans towards", "leans against", "cannot tell"]

MIN_PAIRS = 3
"""Pairs of runs below which a difference is a direction and not a finding."""


@dataclass(frozen=True)
class Claim:
    """A statement of the paper and what these runs say to it."""

    statement: str
    judgement: Judgement
    evidence: str


@dataclass(frozen=True)
class Pairs:
    """Paired differences of one method against the baseline, one for each setting and seed.

    `confounded` names what else differs within the pairs, a learning rate for instance.
    """

    method: str
    dead: tuple[float, ...]
    test: tuple[float, ...]
    confounded: tuple[str, ...] = ()


def compare(summaries: Sequence[RunSummary]) -> list[Pairs]:
    """Pair the finished runs of every method with their baselines."""
    table = runs_table(summaries)
    if table.empty:
        return []
    table = table[table["status"] == "finished"]
    table = table.join(paired_differences(table)).dropna(subset=["dead_difference"])
    pairs = []
    for method in METHOD_NAMES:
        rows = table[table["method"] == str(method)]
        if rows.empty:
            continue
        # Two runs that share a baseline (another α, a repetition) are one piece of evidence.
        unit = rows.groupby(["setting", "schedule", "label_smoothing", "batch_size", "seed"])
        means = unit[["dead_difference", "test_difference"]].mean()
        dead, test = means["dead_difference"], means["test_difference"].dropna()
        confounded = dict.fromkeys(key for keys in rows["confounded"] for key in keys)
        pairs.append(Pairs(METHOD_NAMES[method], tuple(dead), tuple(test), tuple(confounded)))
    return pairs


def comparison(pair: Pairs) -> str:
    """Say in a sentence how a method differs from the baseline."""
    count = len(pair.dead)
    dead = _mean(pair.dead)
    more = "fewer" if dead < 0 else "more"
    text = (
        f"{pair.method} against the baseline of the same batch size and seed: "
        + ("as many" if dead == 0 else f"{number(abs(dead), 0 if count == 1 else 1)} {more}")
        + " dead filters"
    )
    if pair.test:
        text += f", test accuracy {number(_mean(pair.test), sign=True)}"
        interval = interval95(pair.test)
        if math.isfinite(interval):
            text += (
                f" ± {number(interval)} points (95 % interval, {plural(len(pair.test), 'pair')})"
            )
        else:
            text += " points (one pair)"
    return text + "." + (f" {_confounded(pair)}." if pair.confounded else "")


def _confounded(pair: Pairs) -> str:
    verb = "differ" if len(pair.confounded) > 1 else "differs"
    return f"Their {join(pair.confounded)} {verb} too"


def judge(summaries: Sequence[RunSummary]) -> list[Claim]:
    """Judge what the paper says of PGT and of recovery by these runs.

    Its Fig. 3, Table 2 and Section 4.1 are about networks without batch normalisation, its Table 1
    about networks with it: each statement is judged by the runs that it is about.
    """
    normalised = [each for each in summaries if is_batch_normalised(each.run.config)]
    plain = [each for each in summaries if not is_batch_normalised(each.run.config)]
    return [
        *(_judge_plain(plain) if plain or not normalised else []),
        *(_judge_normalised(normalised) if normalised else []),
    ]


def _judge_plain(summaries: Sequence[RunSummary]) -> list[Claim]:
    pgt = _pgt(summaries)
    return [
        _difference_claim(
            "PGT reduces the number of zeroed-out filters (Fig. 3)",
            pgt,
            pgt.dead if pgt else (),
            -1,
            "dead filters",
        ),
        _difference_claim(
            "PGT improves test accuracy (Table 2: +0.68 to +1.02 points)",
            pgt,
            pgt.test if pgt else (),
            +1,
            "points of test accuracy",
        ),
        _recovery_claim(summaries),
    ]


def _judge_normalised(summaries: Sequence[RunSummary]) -> list[Claim]:
    pgt = _pgt(summaries)
    return [
        _difference_claim(
            "PGT improves test accuracy with batch normalisation (Table 1: +0.09 to +0.73 points)",
            pgt,
            pgt.test if pgt else (),
            +1,
            "points of test accuracy",
        )
    ]


def _pgt(summaries: Sequence[RunSummary]) -> Pairs | None:
    return next((pair for pair in compare(summaries) if pair.method == "PGT"), None)


def _difference_claim(
    statement: str, pair: Pairs | None, values: Sequence[float], wanted: int, unit: str
) -> Claim:
    if pair is None or not values:
        evidence = "no finished PGT run with a baseline of the same setting, batch size and seed"
        return Claim(statement, "cannot tell", evidence)
    mean, interval = _mean(values), interval95(values)
    digits = 0 if all(value == int(value) for value in values) and len(values) == 1 else 2
    evidence = f"{number(mean, digits, sign=True)} {unit} over {plural(len(values), 'pair')}"
    if math.isfinite(interval):
        evidence += f", 95 % interval ± {number(interval)}"
    if pair.confounded:
        evidence += f". {_confounded(pair)}, so the method may not be the cause"
    towards = mean * wanted > 0
    few = len(values) < MIN_PAIRS
    undecided = min(values) * max(values) <= 0 if few else abs(mean) <= interval
    if mean == 0 or undecided:
        return Claim(statement, "cannot tell", evidence)
    if few or pair.confounded:
        return Claim(statement, "leans towards" if towards else "leans against", evidence)
    return Claim(statement, "agrees" if towards else "contradicts", evidence)


def _recovery_claim(summaries: Sequence[RunSummary]) -> Claim:
    """Test the claim where it is exact, on collapsed norms; deaths by silence only lean.

    A filter that was silent from the first batch was not zeroed out by training: when it wakes,
    that says nothing about this claim.
    """
    statement = "A filter once zeroed out does not recover (Section 4.1)"
    later = [each.deaths.drop(index=each.never_alive.index) for each in summaries]
    deaths = sum(len(each) for each in later)
    if not deaths:
        born = any(len(each.never_alive) for each in summaries)
        evidence = "no filter died after the first batch" if born else "no filter died"
        return Claim(statement, "cannot tell", evidence)
    revived = pd.concat([each[each["revival_iteration"].notna()] for each in later])
    events = pd.concat([summary.run.events for summary in summaries])
    collapsed = events[events["kind"] == "collapsed"]
    back = int(collapsed["end_iteration"].notna().sum())
    evidence = f"{len(revived):,} of {plural(deaths, 'death')} ended in a revival"
    if len(revived):
        evidence += f" ({_where(summaries, revived)})"
    if collapsed.empty:
        evidence += "; no norm has collapsed, and that is what the paper calls zeroed out"
        return Claim(statement, "leans against" if len(revived) else "leans towards", evidence)
    norms = f"{back:,} of {plural(len(collapsed), 'collapsed norm')} grew again"
    return Claim(statement, "contradicts" if back else "agrees", f"{norms}; {evidence}")


def _where(summaries: Sequence[RunSummary], revived: pd.DataFrame) -> str:
    open_layers = {
        layer.name for each in summaries for layer in each.run.layers if can_revive(layer)
    }
    after_sum = int(revived["layer"].isin(open_layers).sum())
    counts = revived["layer"].value_counts().head(3)
    named = [f"{printable(layer)} {count:,}" for layer, count in counts.items()]
    return (
        f"most in {join(named)}; {after_sum:,} in conv2 and downsample layers, whose ReLU follows "
        f"the addition, {len(revived) - after_sum:,} in the stem and conv1 layers"
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
