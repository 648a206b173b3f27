"""The verdict: what died, how the runs compare, what the paper says, and what to be careful of.

Plain data: sentences with numbers in them. The page and the terminal only print it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from pgt_diag.text import printable
from reports.claims import Claim, compare, comparison, judge
from reports.roles import SETTING, data_label, data_of
from reports.source import Run
from reports.summary import NORM_TEST_BUDGET, Epoch, RunSummary, summarise
from reports.tables import runs_table
from reports.text import (
    METHOD_NAMES,
    death_counts,
    join,
    layer_name,
    number,
    plural,
    runs_of_seeds,
    share,
)

MAX_SINGLE_FACTS = 4
"""Runs up to which each gets its own number in large type."""


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
class Verdict:
    """Everything the first screen of a report says."""

    facts: tuple[Fact, ...]
    sentences: tuple[Statement, ...]
    comparisons: tuple[str, ...]
    claims: tuple[Claim, ...]
    warnings: tuple[str, ...]


def verdict(runs: Sequence[Run], epoch: Epoch = Epoch.BEST) -> Verdict:
    """Judge the runs; works for one run, for many, and for runs that have barely started."""
    summaries = summarise(runs, epoch)
    pairs = compare(summaries)
    return Verdict(
        facts=tuple(_facts(summaries)),
        sentences=tuple(Statement(each.label, _course(each)) for each in summaries),
        comparisons=tuple(comparison(pair) for pair in pairs),
        claims=tuple(judge(summaries)),
        warnings=tuple(_status_warnings(summaries) + _comparability_warnings(summaries)),
    )


def _facts(summaries: Sequence[RunSummary]) -> list[Fact]:
    if len(summaries) > MAX_SINGLE_FACTS:
        return _facts_by_method(summaries)
    facts = []
    for summary in summaries:
        counts = summary.counts
        detail = f"of {summary.filters:,} filters dead at the end"
        if summary.silent_from_start:
            detail += f", {summary.silent_from_start:,} of them silent from the first batch"
        if len(summary.unknown):
            detail += f", {len(summary.unknown):,} unknown"
        if counts.revivals:
            detail += f"; {plural(counts.deaths, 'death')}, {plural(counts.revivals, 'revival')}"
        facts.append(Fact(f"{summary.dead:,}", summary.label, detail))
    for summary in summaries if len(summaries) <= 2 else ():
        if summary.accuracy:
            which = "best" if summary.epoch is Epoch.BEST else "last"
            detail = f"{which} test accuracy, epoch {summary.accuracy.epoch}"
            facts.append(Fact(f"{number(summary.accuracy.test)} %", summary.label, detail))
    return facts


def _facts_by_method(summaries: Sequence[RunSummary]) -> list[Fact]:
    """Return the mean number of dead filters of each method, over its finished runs."""
    table = runs_table(summaries)
    table = table[(table["status"] == "finished") & table["batch_size"].notna()]
    facts = []
    for method, name in METHOD_NAMES.items():
        mine = table[table["method"] == str(method)]
        dead = mine["dead"]
        if len(dead):
            low, high = f"{dead.min():,}", f"{dead.max():,}"
            runs = runs_of_seeds(len(dead), mine["seed"].nunique())
            detail = f"dead filters at the end, mean of {runs}"
            detail += f" ({low} to {high})" if low != high else ""
            if unknown := int(mine["unknown"].max()):
                detail += f"; up to {unknown:,} more are unknown"
            mean = float(dead.groupby(mine["seed"]).mean().mean())
            facts.append(Fact(number(mean, 0), name, detail))
    return facts


def _course(summary: RunSummary) -> str:
    count, filters = summary.run.iteration_count, plural(summary.filters, "filter")
    if not count:
        return "no iteration is recorded yet."
    if summary.deaths.empty:
        text = _none_died(summary)
    else:
        are = "is" if summary.dead == 1 else "are"
        text = [
            f"{summary.dead:,} of {filters} ({share(summary.dead, summary.filters)}) {are} dead "
            f"after {plural(count, 'iteration')}.",
            *_since_when(summary),
            _recovered(summary),
            *_unknown(summary),
        ]
    return " ".join([*text, *_first_and_worst(summary), *_decay_sentence(summary)])


def _since_when(summary: RunSummary) -> list[str]:
    """Tell filters that never lived from those that died: only the latter are the training's."""
    never = summary.silent_from_start
    if not never:
        return []
    later = summary.dead - never
    return [
        f"{never:,} {'was' if never == 1 else 'were'} silent from the {_first_batch(summary)}; "
        f"{f'{later:,}' if later else 'none'} died later."
    ]


def _first_batch(summary: RunSummary) -> str:
    # A recorder in somebody's own loop may have been attached to a trained network.
    return "first batch" if summary.run.config is not None else "first recorded batch"


def _recovered(summary: RunSummary) -> str:
    """Relate every count of the page: deaths, filters that died, revivals, dead at the end."""
    counts, never = summary.counts, len(summary.never_alive)
    if not counts.revivals:
        return "None recovered."
    text = f"{death_counts(counts)}."
    if never:
        awoken = int(summary.revived.index.isin(summary.never_alive.index).sum())
        text += f" {never:,} of the deaths began with the {_first_batch(summary)}"
        text += f", {f'{awoken:,}' if awoken else 'none'} of these ended in a revival."
    return text


def _none_died(summary: RunSummary) -> list[str]:
    """Say that no filter died: of those that can be told, and if the run was long enough."""
    count, undecided = summary.run.iteration_count, len(summary.undecided)
    filters, length = plural(summary.filters, "filter"), plural(count, "iteration")
    if undecided == summary.filters:
        text = [f"whether any of {filters} died in {length} is unknown: {_unseen(summary)}."]
    elif undecided:
        told = plural(summary.filters - undecided, "filter")
        text = [f"none of the {told} that can be told died in {length}.", *_unknown(summary)]
    else:
        text = [f"none of {filters} died in {length}."]
    if count < summary.window:
        text.append(f"A filter counts as dead from {plural(summary.window, 'iteration')} on.")
    return text


def _unknown(summary: RunSummary) -> list[str]:
    undecided = len(summary.undecided)
    if not undecided:
        return []
    whose = "it" if undecided == 1 else "they"
    others = plural(undecided, "other filter")
    told = f"Of {others} it is unknown whether {whose} died"
    if len(summary.unknown) != undecided:
        told += f", of {len(summary.unknown):,} of these also whether they are dead at the end"
    return [f"{told}: {_unseen(summary)}."]


def _unseen(summary: RunSummary) -> str:
    """Say what was not seen of the layers whose filters' fate is unknown."""
    spells = summary.run.unknown_spells
    spells = spells[spells["layer_index"].isin(summary.undecided["layer_index"])]
    told = {"silent": "no activation", "zero_gradient": "no gradient"}
    return " and ".join(
        f"{what} was seen in {_few([layer_name(layer) for layer in layers])}"
        for kind, what in told.items()
        if (layers := list(dict.fromkeys(spells.loc[spells["kind"] == kind, "layer"])))
    )


def _few(names: Sequence[str]) -> str:
    return join(names if len(names) <= 3 else [*names[:3], plural(len(names) - 3, "other layer")])


def _first_and_worst(summary: RunSummary) -> list[str]:
    first, parts = summary.first_death, []
    if first is not None:
        parts.append(
            f"The first death: {layer_name(first.layer)} (layer {first.layer_index}), "
            f"filter {first.filter}, at iteration {first.iteration:,}."
        )
    worst = summary.by_layer.sort_values("dead", ascending=False, kind="stable").head(2)
    named = [
        f"{layer_name(layer)} ({dead:,} of {filters:,})"
        for layer, dead, filters in zip(worst.index, worst["dead"], worst["filters"], strict=True)
        if dead
    ]
    return [*parts, f"Most are in {join(named)}."] if named else parts


def _decay_sentence(summary: RunSummary) -> list[str]:
    """Say what the norms can show: without decay enough, a dead filter's norm looks alive."""
    # A filter that was never alive decays from the start, whenever the first one died.
    start = 0 if summary.deaths.empty else int(summary.deaths["iteration"].min())
    budget = summary.budget_since(start)
    if budget is None:
        return []
    since = "since the first death" if start else "of the whole run"
    shown = f"{budget:,.0f}" if budget >= 100 else f"{budget:.2g}"
    amount = f"The decay budget {since} is {shown} of the {NORM_TEST_BUDGET:.1f} needed"
    if budget < NORM_TEST_BUDGET:
        return [f"{amount}: by decay alone no norm can have collapsed to 1e-2 of its value yet."]
    if summary.deaths.empty:
        return [f"{amount}: the norm of a dead filter could have collapsed to 1e-2."]
    return [f"{amount}: the norms of early deaths have had time to collapse to 1e-2."]


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
    for key in (*SETTING, "seed", "lr", "weight_decay"):
        values = {str(getattr(each.run.config, key)): each.label for each in configured}
        if len(values) > 1 and not (key == "seed" and _seeds_are_paired(configured)):
            named = [f"{printable(value)} ({label})" for value, label in list(values.items())[:4]]
            warnings.append(f"The runs differ in {key.replace('_', ' ')}: {join(named)}.")
    warnings += _data_warnings(configured)
    without = [each.label for each in summaries if each.run.config is None]
    if without and len(summaries) > 1:
        warnings.append(f"{join(without[:4])}: no configuration is recorded, so nothing is paired.")
    return warnings


def _data_warnings(configured: Sequence[RunSummary]) -> list[str]:
    numbers = data_of([each.run for each in configured])
    kinds = list(dict(zip(numbers, configured, strict=True)).values())
    if len(kinds) < 2:
        return []
    named = [
        f"{data_label(each.run, [other.run for other in kinds if other is not each])} "
        f"({each.label})"
        for each in kinds[:4]
    ]
    told = f"The runs differ in their data: {join(named)}."
    return [f"{told} Only runs on the same images are paired."]


def _seeds_are_paired(summaries: Sequence[RunSummary]) -> bool:
    seeds: dict[str, set[int]] = {}
    for summary in summaries:
        if summary.run.config is not None:
            seeds.setdefault(str(summary.run.config.method), set()).add(summary.run.config.seed)
    return len({frozenset(each) for each in seeds.values()}) == 1
