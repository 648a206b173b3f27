"""How runs compare with their baselines, and what that says to the paper's statements."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import pandas as pd

from reports.intervals import interval95, leaves_zero_out
from reports.layouts import is_batch_normalised
from reports.summary import RunSummary
from reports.tables import PAIRED_BY, paired_differences, runs_table
from reports.text import METHOD_NAMES, join, layer_name, number, plural

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
    differences = ["dead_difference", "test_difference"]
    table = table.join(paired_differences(table)).dropna(subset=differences, how="all")
    pairs = []
    for method in METHOD_NAMES:
        rows = table[table["method"] == str(method)]
        if rows.empty:
            continue
        # Two runs that share a baseline (another α, a repetition) are one piece of evidence.
        unit = rows.groupby([*PAIRED_BY, "schedule", "label_smoothing"])
        means = unit[differences].mean()
        dead, test = (means[name].dropna() for name in differences)
        confounded = dict.fromkeys(key for keys in rows["confounded"] for key in keys)
        pairs.append(Pairs(METHOD_NAMES[method], tuple(dead), tuple(test), tuple(confounded)))
    return pairs


def comparison(pair: Pairs) -> str:
    """Say in a sentence how a method differs from the baseline."""
    count = max(len(pair.dead), len(pair.test))
    parts = []
    if len(pair.dead) == 1:
        dead = pair.dead[0]
        many = f"{number(abs(dead), 0)} {'fewer' if dead < 0 else 'more'}" if dead else "as many"
        parts.append(f"{many} dead filters")
    elif pair.dead:
        parts.append(f"dead filters {_with_interval(pair.dead)}")
    else:
        parts.append("nobody can tell how many more or fewer filters are dead")
    if pair.test:
        parts.append(f"test accuracy {_with_interval(pair.test)} points")
    text = f"{pair.method} against the baseline of the same batch size and seed: {', '.join(parts)}"
    if count == 1:
        text += " (one pair: no more than a direction)"
    else:
        text += f" (95 % intervals, {plural(count, 'pair')}; {_told_apart(pair)})"
    return text + "." + (f" {_confounded(pair)}." if pair.confounded else "")


def _with_interval(values: Sequence[float]) -> str:
    interval = interval95(values)
    text = number(_mean(values), sign=True)
    return f"{text} ± {number(interval)}" if math.isfinite(interval) else text


def _told_apart(pair: Pairs) -> str:
    """Say which of the differences are more than chance: those whose interval leaves 0 out."""
    names = {"dead filters": pair.dead, "test accuracy": pair.test}
    clear = [name for name, values in names.items() if leaves_zero_out(values)]
    unclear = [name for name, values in names.items() if values and name not in clear]
    if not unclear:
        return "0 is outside"
    return f"0 is inside for {join(unclear)}: no difference is shown"


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
        evidence = (
            "no finished PGT run with a baseline of the same setting, data, batch size and seed"
        )
        if pair is not None:
            evidence = "of some filters of each pair nobody can tell whether they are dead"
        return Claim(statement, "cannot tell", evidence)
    mean, interval = _mean(values), interval95(values)
    digits = 0 if all(value == int(value) for value in values) and len(values) == 1 else 2
    evidence = f"{number(mean, digits, sign=True)} {unit} over {plural(len(values), 'pair')}"
    if math.isfinite(interval):
        evidence += f", 95 % interval ± {number(interval)}"
    else:
        evidence += ", which is no more than a direction"
    if pair.confounded:
        evidence += f". {_confounded(pair)}, so the method may not be the cause"
    if not leaves_zero_out(values):
        return Claim(statement, "cannot tell", evidence)
    towards = mean * wanted > 0
    if len(values) < MIN_PAIRS or pair.confounded:
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
        if any(len(each.undecided) for each in summaries):
            evidence = "nobody can tell whether a filter died"
        elif any(len(each.never_alive) for each in summaries):
            evidence = "no filter died after the first batch"
        else:
            evidence = "no filter died"
        return Claim(statement, "cannot tell", evidence)
    revived = [each[each["revival_iteration"].notna()] for each in later]
    back = sum(map(len, revived))
    evidence = f"{back:,} of {plural(deaths, 'death')} after the first batch ended in a revival"
    if back:
        evidence += f" ({_where(summaries, revived)})"
    collapsed, grown = _collapses(summaries)
    if not collapsed:
        evidence += "; no norm has collapsed, and that is what the paper calls zeroed out"
        return Claim(statement, "leans against" if back else "leans towards", evidence)
    norms = f"{grown:,} of {plural(collapsed, 'collapse')} of a norm ended in its growing again"
    return Claim(statement, "contradicts" if grown else "agrees", f"{norms}; {evidence}")


def _collapses(summaries: Sequence[RunSummary]) -> tuple[int, int]:
    """Return how many collapses lasted as long as a death must, and how many of them ended."""
    collapsed = grown = 0
    for each in summaries:
        events = each.run.events
        ended = events["end_iteration"].fillna(each.run.iteration_count)
        long = (events["kind"] == "collapsed") & (ended - events["start_iteration"] >= each.window)
        collapsed += int(long.sum())
        grown += int(events.loc[long, "end_iteration"].notna().sum())
    return collapsed, grown


def _where(summaries: Sequence[RunSummary], revived: Sequence[pd.DataFrame]) -> str:
    """Say in which layers the revivals were, and whether an addition stands before the activation.

    A filter at zero gets a gradient only where it does.
    """
    counts = pd.concat(revived)["layer"].value_counts().head(3)
    named = [f"{layer_name(layer)} ({count:,})" for layer, count in counts.items()]
    addition: dict[bool | None, int] = {True: 0, False: 0, None: 0}
    for summary, rows in zip(summaries, revived, strict=True):
        known = {layer.index: layer.addition for layer in summary.run.layers}
        for index in rows["layer_index"].tolist():
            addition[known.get(index)] += 1
    text = f"most in {join(named)}"
    if addition[True] or addition[False]:
        text += f"; {addition[True]:,} where an addition stands before the activation, "
        text += f"{addition[False]:,} where none does"
        text += f", {addition[None]:,} where the run does not say" if addition[None] else ""
    return text


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
