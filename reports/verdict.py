"""The verdict: what died, how the runs compare, what the paper says, and what to be careful of.

Plain data: sentences with numbers in them. The page and the terminal only print it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import pandas as pd

from reports.source import Run
from reports.summary import NORM_TEST_BUDGET, RunSummary, can_revive, summarise
from reports.tables import SETTING_KEYS, interval95, paired_differences, runs_table
from reports.text import METHOD_NAMES, join, number, plural, printable, share

Judgement = Literal["agrees", "contradicts", "leans towards", "leans against", "cannot tell"]

MIN_PAIRS = 3
"""Pairs of runs below which a difference is a direction and not a finding."""


@dataclass(frozen=True)
class Fact:
    """One number worth a large type: value, what it counts, and what it is out of."""

    value: str
    label: str
    detail: str


@dataclass(frozen=True)
class Statement:
    """What happened in one run: the run's label and sentences about it."""

    label: str
    text: str

    def __str__(self) -> str:
        return f"{self.label}: {self.text}"


@dataclass(frozen=True)
class Claim:
    """A statement of the paper and what these runs say to it."""

    statement: str
    judgement: Judgement
    evidence: str


@dataclass(frozen=True)
class Verdict:
    """Everything the first screen of a report says."""

    facts: tuple[Fact, ...]
    sentences: tuple[Statement, ...]
    comparisons: tuple[str, ...]
    claims: tuple[Claim, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Pairs:
    """Paired differences of one method against the baseline, over settings and seeds."""

    method: str
    dead: tuple[float, ...]
    test: tuple[float, ...]


def verdict(runs: Sequence[Run]) -> Verdict:
    """Judge the runs; works for one run, for many, and for runs that have barely started."""
    summaries = summarise(runs)
    pairs = _pairs(summaries)
    return Verdict(
        facts=tuple(_facts(summaries)),
        sentences=tuple(Statement(each.label, _course(each)) for each in summaries),
        comparisons=tuple(_comparison(pair) for pair in pairs),
        claims=tuple(_claims(summaries, pairs)),
        warnings=tuple(_status_warnings(summaries) + _comparability_warnings(summaries)),
    )


def _facts(summaries: Sequence[RunSummary]) -> list[Fact]:
    facts = []
    for summary in summaries[:4]:
        detail = f"of {summary.filters:,} filters dead at the end"
        if len(summary.revived):
            detail += f"; {plural(len(summary.revived), 'revival')}"
        facts.append(Fact(f"{summary.dead:,}", summary.label, detail))
    for summary in summaries[:4] if len(summaries) <= 2 else ():
        if summary.accuracy:
            detail = f"best test accuracy, epoch {summary.accuracy.epoch}"
            facts.append(Fact(f"{number(summary.accuracy.test)} %", summary.label, detail))
    return facts


def _course(summary: RunSummary) -> str:
    count, filters = summary.run.iteration_count, plural(summary.filters, "filter")
    if not count:
        return "no iteration is recorded yet."
    if summary.deaths.empty:
        text = f"none of {filters} died in {plural(count, 'iteration')}."
    else:
        revived = len(summary.revived.drop_duplicates(["layer", "filter"]))
        text = (
            f"{summary.dead:,} of {filters} ({share(summary.dead, summary.filters)}) are dead "
            f"after {plural(count, 'iteration')}; "
            + (f"{plural(revived, 'filter')} died and recovered." if revived else "none recovered.")
        )
    return " ".join([text, *_first_and_worst(summary), *_decay_sentence(summary)])


def _first_and_worst(summary: RunSummary) -> list[str]:
    first = summary.first_death
    if first is None:
        return []
    parts = [
        f"The first death: {printable(first.layer)} (layer {first.layer_index}), "
        f"filter {first.filter}, at iteration {first.iteration:,}."
    ]
    worst = summary.by_layer.sort_values("dead", ascending=False, kind="stable").head(2)
    named = [
        f"{printable(layer)} {dead:,} of {filters:,}"
        for layer, dead, filters in zip(worst.index, worst["dead"], worst["filters"], strict=True)
        if dead
    ]
    return [*parts, f"Most are in {join(named)}."] if named else parts


def _decay_sentence(summary: RunSummary) -> list[str]:
    """Say what the norms can show: without decay enough, a dead filter's norm looks alive."""
    first = summary.first_death
    budget = summary.budget_since(0 if first is None else first.iteration)
    if budget is None:
        return []
    since = "of the whole run" if first is None else "since the first death"
    amount = f"The decay budget {since} is {budget:.2g} of the {NORM_TEST_BUDGET:.1f} needed"
    if budget < NORM_TEST_BUDGET:
        return [f"{amount}: by decay alone no norm can have collapsed to 1e-2 of its value yet."]
    return [f"{amount}: the norms of early deaths have had time to collapse to 1e-2."]


def _pairs(summaries: Sequence[RunSummary]) -> list[Pairs]:
    table = runs_table(summaries)
    if table.empty:
        return []
    table = table[table["status"] == "finished"]
    differences = paired_differences(table).dropna(subset=["dead_difference"])
    pairs = []
    for method in METHOD_NAMES:
        rows = differences[table.loc[differences.index, "method"] == str(method)]
        if len(rows):
            dead, test = rows["dead_difference"], rows["test_difference"].dropna()
            pairs.append(Pairs(METHOD_NAMES[method], tuple(dead), tuple(test)))
    return pairs


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def _comparison(pair: Pairs) -> str:
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
    return text + "."


def _claims(summaries: Sequence[RunSummary], pairs: Sequence[Pairs]) -> list[Claim]:
    pgt = next((pair for pair in pairs if pair.method == "PGT"), None)
    return [
        _difference_claim(
            "PGT reduces the number of zeroed-out filters (Fig. 3)",
            pgt.dead if pgt else (),
            -1,
            "dead filters",
        ),
        _difference_claim(
            "PGT improves test accuracy (Table 2: +0.68 to +1.02 points)",
            pgt.test if pgt else (),
            +1,
            "points of test accuracy",
        ),
        _recovery_claim(summaries),
    ]


def _difference_claim(statement: str, values: Sequence[float], wanted: int, unit: str) -> Claim:
    if not values:
        evidence = "no finished PGT run with a baseline of the same setting, batch size and seed"
        return Claim(statement, "cannot tell", evidence)
    mean, interval = _mean(values), interval95(values)
    digits = 0 if all(value == int(value) for value in values) and len(values) == 1 else 2
    evidence = f"{number(mean, digits, sign=True)} {unit} over {plural(len(values), 'pair')}"
    if math.isfinite(interval):
        evidence += f", 95 % interval ± {number(interval)}"
    towards = mean * wanted > 0
    if mean == 0 or (len(values) >= MIN_PAIRS and abs(mean) <= interval):
        return Claim(statement, "cannot tell", evidence)
    if len(values) < MIN_PAIRS:
        return Claim(statement, "leans towards" if towards else "leans against", evidence)
    return Claim(statement, "agrees" if towards else "contradicts", evidence)


def _recovery_claim(summaries: Sequence[RunSummary]) -> Claim:
    """Test the claim where it is exact, on collapsed norms; deaths by silence only lean."""
    statement = "A filter once zeroed out does not recover (Section 4.1)"
    deaths = sum(len(summary.deaths) for summary in summaries)
    if not deaths:
        return Claim(statement, "cannot tell", "no filter died")
    revived = pd.concat([summary.revived for summary in summaries])
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


def _status_warnings(summaries: Sequence[RunSummary]) -> list[str]:
    said = {
        "running": "is still training: numbers are those so far",
        "interrupted": "was interrupted: it ends before its last planned epoch",
        "diverged": "diverged: what it recorded before is shown",
        "failed": "failed: what it recorded before is shown",
    }
    warnings = []
    for summary in summaries:
        if summary.run.status == "finished":
            continue
        status = said.get(summary.run.status, f"has status {printable(summary.run.status)}")
        message = summary.run.info.get("message")
        reason = f" ({printable(message, 200)})" if message else ""
        warnings.append(
            f"{summary.label} {status}{reason}, iteration {summary.run.iteration_count:,}."
        )
    return warnings


def _comparability_warnings(summaries: Sequence[RunSummary]) -> list[str]:
    warnings = []
    configured = [summary for summary in summaries if summary.run.config is not None]
    for key in (*SETTING_KEYS, "seed", "lr", "weight_decay"):
        values = {str(getattr(each.run.config, key)): each.label for each in configured}
        if len(values) > 1 and not (key == "seed" and _seeds_are_paired(configured)):
            named = [f"{printable(value)} ({label})" for value, label in list(values.items())[:4]]
            warnings.append(f"The runs differ in {key.replace('_', ' ')}: {join(named)}.")
    without = [each.label for each in summaries if each.run.config is None]
    if without and len(summaries) > 1:
        warnings.append(f"{join(without[:4])}: no configuration is recorded, so nothing is paired.")
    return warnings


def _seeds_are_paired(summaries: Sequence[RunSummary]) -> bool:
    seeds: dict[str, set[int]] = {}
    for summary in summaries:
        if summary.run.config is not None:
            seeds.setdefault(str(summary.run.config.method), set()).add(summary.run.config.seed)
    return len({frozenset(each) for each in seeds.values()}) == 1
