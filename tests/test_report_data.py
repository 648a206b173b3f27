"""What a report shows, before anything is drawn: lines, panels, maps, sprites, the verdict."""

import base64
import dataclasses
import html
import io
import json
import math
import re
import warnings

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from pgt_diag.config import RunConfig
from pgt_diag.errors import ConfigurationError
from pgt_diag.text import MAX_LABEL, printable
from reports import figures, panels, sprites, stills, text, zeroout
from reports.demo import DemoLayer, DemoRun, demo_runs
from reports.digest import digest
from reports.exports import export_table
from reports.lines import pack, thin, unpack
from reports.page import build_page
from reports.records import paper_tables, run_cards
from reports.summary import summarise
from reports.tables import table2
from reports.verdict import verdict


@pytest.fixture(scope="module")
def pair():
    return summarise(demo_runs(iteration_count=2000, record_every=10))


def config(method="baseline", **values):
    return RunConfig.from_mapping({"method": method, "epochs": 3, "warmup_epochs": 0} | values)


# Lines


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (300, 40)])
def test_packed_lines_come_back(shape):
    rng = np.random.default_rng(0)
    values = np.abs(rng.normal(1, 0.3, shape) + 0.01 * rng.normal(size=shape).cumsum(0))
    packed = pack(values.astype(np.float32))
    step = packed.top / (packed.levels - 1)
    assert np.abs(unpack(packed) - values).max() <= 0.51 * step


def test_zero_stays_zero_and_nothing_else_becomes_zero():
    values = np.array([[1.0, 0.0, 1e-23, np.nan], [1.0, 1e-9, 0.0, np.inf]], np.float32)
    back = unpack(pack(values))
    assert ((back == 0) == (values == 0)).all()
    assert (np.isnan(back) == ~np.isfinite(values)).all()


def test_quiet_lines_are_kept_finer_than_noisy_ones():
    time = np.linspace(0, 1, 500)[:, None]
    noise = np.random.default_rng(0).normal(1, 0.1, (500, 20))
    assert pack(1 + time * np.ones((1, 20)) * 0.001).levels > pack(np.abs(noise)).levels


def test_codes_fit_two_planes_at_the_extremes():
    values = np.array([[0.0, 1.0, np.nan, 1e-9], [1.0, 0.0, 1.0, np.nan], [np.nan, 1.0, 0.0, 1.0]])
    back = unpack(pack(values.astype(np.float32)))
    assert np.array_equal(np.isnan(back), np.isnan(values))
    assert np.allclose(back[values > 0.5], 1, atol=1e-4)
    assert np.array_equal(back == 0, values == 0)


def test_thinning_keeps_a_dip():
    values = np.ones((1000, 2), np.float32)
    values[503, 1] = 0.0
    table = thin(pd.DataFrame(values), 50)
    assert len(table) == 50
    assert table[1].min() == 0 and table[0].min() == 1


def test_thinning_keeps_a_dip_between_stored_rows():
    table = pd.DataFrame(np.ones((4, 1), np.float32))
    lowest = table.copy()
    lowest.iloc[2, 0] = 1e-4
    assert thin(table, 10, lowest)[0].tolist() == pytest.approx([1, 1, 1e-4, 1])


# Fig. 3


def test_the_letters_are_the_papers(pair):
    rows = panels.fig3(pair)
    assert [[panel.letter for panel in row] for row in rows] == [["a", "b"], ["c", "d"], ["e", "f"]]
    assert [row[0].subject.split(" ·")[0] for row in rows] == [
        "layer 11 filters",
        "layer 19 filters",
        "GAP features",
    ]
    assert [pair[panel.run].label for panel in rows[0]] == ["Baseline", "PGT (α 0.25)"]
    for row in rows:
        assert len({panel.top for panel in row}) == 1


def test_the_baseline_comes_first_whatever_the_order():
    first, second = demo_runs(200, 10)
    assert [each.run for each in summarise([second, first])] == [first, second]


def test_panels_say_what_died_in_their_layer(pair):
    panel = panels.fig3(pair, [19])[0][0]
    lasting = panel.deaths[panel.deaths["revival_iteration"].isna()]
    assert lasting["filter"].nunique() == pair[0].by_layer.loc["layer4.1.conv2", "dead"]
    assert set(panel.events.columns) == {"kind", "filter", "start_iteration", "end_iteration"}


def layers(count):
    return [DemoLayer(f"conv{i}", i, 4) for i in range(count)]


@pytest.mark.parametrize(
    ("count", "wanted", "found"),
    [
        (20, (11, 19), [11, 19]),
        (9, (11, 19), [5, 8]),
        (1, (11, 19), [0]),
        (53, (11, 19), [30, 52]),
        (20, ("conv3", 4, "7"), [3, 4, 7]),
        (20, (99,), [None]),
    ],
)
def test_layers_by_index_and_name(count, wanted, found):
    resolved = panels.resolve_layers(layers(count), wanted)
    assert [layer and layer.index for layer in resolved] == found


def test_a_layer_that_no_run_has_is_an_error_that_names_it(pair):
    with pytest.raises(ConfigurationError, match=r"'nonsense'.*0 to 19"):
        panels.fig3(pair, ["nonsense"])


def test_the_other_layers_are_all_the_others(pair):
    shown = panels.fig3(pair)
    assert len(panels.other_layers(pair, shown)) == 18


def test_panels_stay_within_their_budget(pair):
    rows = panels.fig3(pair)
    packed = panels.pack_panels(rows, 1500, 200_000)
    assert sum(len(each.lines.data) for row in packed for each in row) <= 210_000
    for each in packed[0]:
        assert len(each.panel.norms) == each.lines.rows


def test_many_runs_get_fewer_bytes_for_lines():
    few, many, crowd = (sum(panels.line_bytes(runs)) for runs in (2, 20, 200))
    assert few > many > crowd > 0


def test_a_still_picture_has_the_lines_where_they_are(pair):
    panel = dataclasses.replace(
        panels.fig3(pair)[0][0],
        norms=pd.DataFrame({0: [1.0, 1.0, 1.0], 1: [2.0, np.nan, 2.0]}, index=[0, 500, 1000]),
        top=2.0,
        bottom=0.0,
        deaths=pd.DataFrame({"filter": [0], "iteration": [500]}),
    )
    drawn = stills.still(panel, 1000)
    assert (drawn.bottom, drawn.top, drawn.last) == ("0.00", "2.08", "1,000")
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(drawn.uri.split(",")[1]))))
    assert pixels.shape == (stills.HEIGHT + stills.RUG, stills.WIDTH)
    middle = round((1 - 1 / 2.08) * (stills.HEIGHT - 1))
    assert (pixels[middle - 1 : middle + 2] == 1).any(axis=0).all()
    # Where a value is missing, the line has a gap.
    assert not (pixels[: stills.HEIGHT] == 2).any()
    assert np.flatnonzero(pixels[-1]).tolist() == [round(0.5 * (stills.WIDTH - 1) - 0.5)]


def test_many_panels_share_the_pixels_of_their_still_pictures(pair):
    row = panels.fig3(pair)[0]
    drawn = stills.stills(row * stills.FULL_PANELS, 2000)
    pixels = Image.open(io.BytesIO(base64.b64decode(drawn[0].uri.split(",")[1]))).size
    assert pixels[0] == pytest.approx(stills.WIDTH / 2**0.5, abs=1)


def test_the_shortest_events_are_left_out_and_the_page_says_so(pair):
    whole = panels.fig3(pair)
    wanted = sum(len(panel.events) for row in whole for panel in row) // 2
    cut = panels._with_longest_events(whole, wanted)
    events = pd.concat([panel.events for row in cut for panel in row])
    assert 0 < len(events) <= wanted
    assert any(panel.cut for row in cut for panel in row)
    lengths = events["end_iteration"].fillna(2000) - events["start_iteration"]
    left_out = [
        panels._lengths(panel)[~panel.events.index.isin(less.events.index)]
        for row, shorter in zip(whole, cut, strict=True)
        for panel, less in zip(row, shorter, strict=True)
    ]
    assert np.concatenate(left_out).max() < lengths.min()


def test_a_diverged_run_does_not_flatten_the_others():
    fine, broken = (DemoRun(name, config(), 0.1, 100, 10) for name in "ab")
    broken = dataclasses.replace(broken, status="diverged")
    huge = broken.weight_norms("layer4.1.conv2") * 1e6
    object.__setattr__(broken, "weight_norms", lambda layer, window=None: huge)
    row = panels.fig3(summarise([fine, broken]), [19])[0]
    assert row[0].top < 10 and row[1].top > 1e5


def test_features_that_end_at_zero_are_dead_from_there():
    norms = pd.DataFrame(np.ones((5, 3), np.float32), index=[0, 10, 20, 30, 40])
    norms.loc[20:, 1] = 0
    norms.loc[10:20, 2] = 0
    dead = panels.silent_features(norms, window=20)
    assert dead[["filter", "iteration"]].to_numpy().tolist() == [[1, 20]]


# Zero-out map


def test_the_map_counts_the_dead_at_every_time(pair):
    for each in pair:
        made = zeroout.zero_out_map(each)
        assert made.dead.iloc[:, -1].tolist() == each.by_layer["dead"].tolist()
        assert len(made.revivals) == len(each.revived)
        at = made.dead.columns[100]
        width = made.dead.columns[101] - at
        deaths = each.deaths
        end = deaths["revival_iteration"].fillna(10**9)
        by_hand = ((deaths["iteration"] < at + width) & (end >= at + width)).sum()
        assert made.dead[at].sum() == by_hand


def test_one_dead_filter_is_visible_on_the_map():
    share = pd.DataFrame([[0.0, 1 / 512, 1.0]])
    alpha = np.asarray(_picture(zeroout.map_png(share)))[0, :, 3]
    assert alpha[0] == 0 and alpha[1] > 50 and alpha[2] == 255


def _picture(uri):
    return Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))


# Fig. 4


def test_sprites_mark_the_zero_channels(pair):
    made = sprites.sprite(pair[0])
    assert len(made.inputs) == 3
    assert _picture(made.uri).size == (made.width * len(made.iterations), made.height * 3)
    last = made.states[made.states["iteration"] == made.iterations[-1]]
    dead = pair[0].lasting[pair[0].lasting["layer"] == "layer1.0.conv1"]
    assert set(last.loc[last["dead"], "channel"]) == set(dead["filter"])
    assert last.loc[last["dead"], "zero"].all()


@pytest.mark.parametrize("size", [(2, 2), (5, 7), (8, 8), (56, 56), (112, 112), (300, 1)])
def test_sprites_take_maps_of_any_size(pair, size):
    first = pair[0].run.feature_maps[0]
    maps = np.random.default_rng(0).random((3, 64, *size), dtype=np.float32)
    maps[0, 5] = 0
    maps[1, 6] = np.nan
    run = dataclasses.replace(pair[0].run)
    run.__dict__["feature_maps"] = (dataclasses.replace(first, maps=maps),)
    made = sprites.sprite(summarise([run])[0])
    assert made.states.query("image == 0 and channel == 5")["zero"].item()
    assert _picture(made.uri).size == (made.width, made.height * 3)


def test_a_run_without_feature_maps_has_no_sprite():
    run = DemoRun("none", None, shape=(("conv1", 4),), iteration_count=10, record_every=1)
    assert sprites.sprite(summarise([run])[0]) is None


# Verdict


def test_the_verdict_counts_what_the_log_says(pair):
    judged = verdict([each.run for each in pair])
    assert judged.facts[0].value == f"{pair[0].dead:,}"
    first = pair[0].first_death
    assert f"filter {first.filter}, at iteration {first.iteration:,}" in str(judged.sentences[0])
    assert f"{pair[0].dead - pair[1].dead} fewer dead filters" in judged.comparisons[0]
    assert not judged.warnings


def test_a_small_decay_budget_is_not_read_as_survival(pair):
    said = verdict([pair[0].run]).sentences[0].text
    budget = pair[0].budget_since(pair[0].first_death.iteration)
    assert budget < math.log(100)
    assert f"is {budget:.2g} of the 4.6 needed: by decay alone no norm can" in said


def _recovery(run, events):
    changed = dataclasses.replace(run)
    changed.__dict__["events"] = events
    return verdict([changed]).claims[-1]


def test_the_recovery_claim_is_tested_on_collapsed_norms(pair):
    run, events = pair[0].run, pair[0].run.events
    assert _recovery(run, events).judgement == "agrees"
    back = events.copy()
    collapsed = back["kind"] == "collapsed"
    starts = back.loc[collapsed, "start_iteration"]
    back.loc[collapsed, "end_iteration"] = starts + pair[0].window
    assert _recovery(run, back).judgement == "contradicts"
    assert f"{collapsed.sum():,} of {collapsed.sum():,} collapses of a norm ended in" in (
        _recovery(run, back).evidence
    )
    back.loc[collapsed, "end_iteration"] = starts + pair[0].window - 1
    assert "no norm has collapsed" in _recovery(run, back).evidence


def test_deaths_by_silence_only_lean(pair):
    run, events = pair[0].run, pair[0].run.events
    silent = events[events["kind"].isin(["silent", "zero_gradient"])]
    claim = _recovery(run, silent)
    assert claim.judgement == "leans against"
    assert claim.evidence.startswith(f"{len(pair[0].revived)} of {len(pair[0].deaths):,} deaths")
    assert f"{len(pair[0].revived)} where an addition stands before the activation, 0 where" in (
        claim.evidence
    )
    lasting = silent[silent["end_iteration"].isna()]
    assert _recovery(run, lasting).judgement == "leans towards"


def _dying(layer, start, end=None, filter_index=0):
    return [(kind, layer, 0, filter_index, start, end) for kind in ("silent", "zero_gradient")]


def _with_events(rows, name="x", **values):
    """Return a run of 1,000 iterations with these events and no others."""
    run = DemoRun(name, config(**values), 0.0, 1000, 100, shape=(("a.conv2", 8),))
    names = ["kind", "layer", "layer_index", "filter", "start_iteration", "end_iteration"]
    events = pd.DataFrame(rows, columns=names)
    run.__dict__["events"] = events.astype({"end_iteration": "Int64"})
    return run


def test_filters_that_never_lived_are_told_from_those_that_died():
    rows = _dying("a.conv2", 0) + _dying("a.conv2", 300, None, 1) + _dying("a.conv2", 0, 500, 2)
    summary = summarise([_with_events(rows)])[0]
    assert (summary.dead, summary.silent_from_start) == (2, 1)
    assert summary.by_layer.loc["a.conv2", ["dead", "silent_from_start"]].tolist() == [2, 1]
    assert summary.first_death.iteration == summary.by_layer.loc["a.conv2", "first_death"] == 300
    said = verdict([summary.run]).sentences[0].text
    assert "1 was silent from the first batch; 1 died later." in said
    assert "3 deaths of 3 filters in all: 1 ended in a revival, 2 last to the end." in said
    assert "2 of the deaths began with the first batch, 1 of these ended in a revival." in said
    assert "The first death: a.conv2 (layer 0), filter 1, at iteration 300." in said


def test_a_filter_that_wakes_says_nothing_about_recovery():
    awoken = _dying("a.conv2", 0, 500)
    claim = verdict([_with_events(awoken)]).claims[-1]
    assert (claim.judgement, claim.evidence) == (
        "cannot tell",
        "no filter died after the first batch",
    )
    died = awoken + _dying("a.conv2", 300, 600, 1)
    claim = verdict([_with_events(died)]).claims[-1]
    assert claim.judgement == "leans against" and claim.evidence.startswith("1 of 1 death")


def _pairs(*differences, **pgt):
    """Return a baseline with 4 dead filters and a PGT run with more or fewer, per seed."""
    runs = []
    for seed, difference in enumerate(differences):
        for method, dead in (("baseline", 4), ("pgt", 4 + difference)):
            rows = [row for i in range(dead) for row in _dying("a.conv2", 100, None, i)]
            values = pgt if method == "pgt" else {}
            runs.append(_with_events(rows, f"{method}{seed}", method=method, seed=seed, **values))
    return runs


@pytest.mark.parametrize(
    ("differences", "judgement"),
    [
        ((-2,), "cannot tell"),
        ((0,), "cannot tell"),
        ((-2, -3), "cannot tell"),
        ((-2, -2), "leans towards"),
        ((2, 2), "leans against"),
        ((-4, 0, -3), "cannot tell"),
        ((-3, 1), "cannot tell"),
        ((-2, -3, -2), "agrees"),
        ((-4, 1, 2), "cannot tell"),
        ((2, 3, 2), "contradicts"),
    ],
)
def test_judgements_need_pairs_that_agree(differences, judgement):
    assert verdict(_pairs(*differences)).claims[0].judgement == judgement


def test_what_else_differs_is_said_and_weakens_the_judgement():
    judged = verdict(_pairs(-2, -3, -2, lr=0.05))
    assert judged.claims[0].judgement == "leans towards"
    assert "Their lr differs too" in judged.claims[0].evidence
    assert judged.comparisons[0].endswith("Their lr differs too.")


def test_runs_that_share_a_baseline_are_one_pair():
    runs = _pairs(-2)
    again = [dataclasses.replace(runs[1], name=f"again{i}") for i in range(3)]
    for each in again:
        each.__dict__["events"] = runs[1].events
    claim = verdict([*runs, *again]).claims[0]
    assert claim.judgement == "cannot tell"
    assert claim.evidence == "−2 dead filters over 1 pair, which is no more than a direction"


def test_many_runs_are_summed_up_by_method():
    facts = verdict(_pairs(-2, -3, -2)).facts
    assert [(fact.label, fact.value) for fact in facts] == [("Baseline", "4"), ("PGT", "2")]
    assert facts[1].detail == "dead filters at the end, mean of 3 runs (1 to 2)"


def test_one_pair_cannot_tell_and_four_pairs_find(pair):
    assert verdict([each.run for each in pair]).claims[0].judgement == "cannot tell"
    many = [
        DemoRun(f"{method}{seed}", config(method, seed=seed), mortality, 400, 10, seed=seed)
        for seed in range(4)
        for method, mortality in (("baseline", 0.4), ("pgt", 0.05))
    ]
    assert verdict(many).claims[0].judgement == "agrees"


def test_the_comparison_says_when_its_interval_holds_0():
    one, unclear, clear = (verdict(_pairs(*each)) for each in ((-2,), (-3, 1), (-2, -2)))
    assert one.comparisons[0].endswith("(one pair: no more than a direction).")
    assert "dead filters −1.00 ± 25.41, test accuracy" in unclear.comparisons[0]
    assert "0 is inside for dead filters" in unclear.comparisons[0]
    assert "0 is inside for dead filters" not in clear.comparisons[0]


def test_copies_of_one_seed_are_called_so():
    runs = [dataclasses.replace(each) for each in _pairs(-2) * 3]
    for each, original in zip(runs, _pairs(-2) * 3, strict=True):
        each.__dict__["events"] = original.events
    facts = verdict(runs).facts
    assert facts[0].detail == "dead filters at the end, mean of 3 runs of one seed"


# Unknown


def _unseen(rows, unseen):
    """Return a run of one layer of 8 filters with these events, and states that nobody saw."""
    run = _with_events(rows)
    names = ["kind", "layer", "layer_index", "filter", "start_iteration", "end_iteration"]
    unknown = [(kind, "a.conv2", 0, i, since, None) for kind, i, since in unseen]
    run.__dict__["unknown_spells"] = pd.DataFrame(unknown, columns=names).astype(
        {"end_iteration": "Int64"}
    )
    return run


def test_where_no_gradient_was_seen_a_silent_filter_is_unknown_and_a_loud_one_alive():
    silent = [("silent", "a.conv2", 0, filter_, 200, None) for filter_ in (2, 5)]
    silent += [("silent", "a.conv2", 0, 6, 200, 205)]  # too short to be a death in any case
    unseen = [("zero_gradient", i, 0) for i in range(8)]
    run = _unseen(silent, unseen)
    (summary,) = summarise([run])
    assert (summary.dead, summary.unknown["filter"].tolist()) == (0, [2, 5])
    assert summary.by_layer.loc["a.conv2", ["dead", "unknown"]].tolist() == [0, 2]
    said = verdict([run]).sentences[0].text
    assert "none of the 6 filters that can be told died in 1,000 iterations" in said
    assert "Of 2 other filters it is unknown whether they died: no gradient was seen in a." in said
    assert verdict([run]).facts[0].detail == "of 8 filters dead at the end, 2 unknown"
    run = _unseen([*silent[:1], ("silent", "a.conv2", 0, 5, 200, 300)], unseen)
    said = verdict([run]).sentences[0].text
    assert "they died, of 1 of these also whether they are dead at the end: no gradient" in said
    assert verdict([run]).claims[-1].evidence == "nobody can tell whether a filter died"
    assert run_digest(run)["unknown"] == run_digest(run)["layers"][0]["unknown"] == 1


def run_digest(run):
    return digest([run])["runs"][0]


def test_where_nothing_was_seen_every_filter_is_unknown():
    unseen = [(kind, i, 0) for kind in ("silent", "zero_gradient") for i in range(8)]
    run = _unseen([], unseen)
    said = verdict([run]).sentences[0].text
    assert said.startswith(
        "whether any of 8 filters died in 1,000 iterations is unknown: no activation was seen in "
        "a.conv2 and no gradient was seen in a.conv2."
    )
    page = build_page([run])
    assert "none of 8 filters died" not in page and "No filter died" not in page
    assert "of 8 filters nobody can tell" in page
    assert "0 of 8 filters dead at the end, 8 may have died" in page
    made = zeroout.zero_out_map(summarise([run])[0])
    assert made.unknown.to_numpy().tolist() == [[8] * made.dead.shape[1]]
    assert (np.asarray(_picture(zeroout.map_png(made.share, made.unknown)))[0, :, 3] > 0).all()


def test_a_filter_that_died_for_sure_is_dead_whatever_else_was_not_seen():
    collapsed = [("collapsed", "a.conv2", 0, 1, 300, None)]
    run = _unseen(collapsed, [("zero_gradient", i, 0) for i in range(8)])
    (summary,) = summarise([run])
    assert (summary.dead, len(summary.unknown)) == (1, 0)


def test_a_pair_with_unknown_filters_is_not_compared_by_its_dead():
    runs = _pairs(-2)
    silent = [("silent", "a.conv2", 0, 2, 200, None)]
    unknown = _unseen(silent, [("zero_gradient", 2, 0)])
    runs[1].__dict__["events"] = unknown.events
    runs[1].__dict__["unknown_spells"] = unknown.unknown_spells
    judged = verdict(runs)
    assert "nobody can tell how many more or fewer filters are dead" in judged.comparisons[0]
    assert judged.claims[0].judgement == "cannot tell"
    row = table2(runs).query("method == 'pgt' and runs > 0").iloc[0]
    assert (row["dead"], row["unknown"], row["pairs"]) == (0, 1, 1)
    cells = [row for table in paper_tables(runs) for g in table["groups"] for row in g["rows"]]
    assert cells[1]["dead"] == "0, 1 unknown"


def test_too_short_a_run_does_not_say_that_all_live():
    run = dataclasses.replace(
        DemoRun("x", config(), 0, 50, 5), status="running", extra={"planned_iterations": 9000}
    )
    said = verdict([run]).sentences[0].text
    assert "none of 4,800 filters died in 50 iterations. A filter counts as dead from 90" in said


# One count


def test_every_count_of_the_page_is_related_to_every_other():
    rows = _dying("a.conv2", 0) + _dying("a.conv2", 300, None, 1) + _dying("a.conv2", 0, 500, 2)
    for start in (100, 300, 500):  # three deaths of one filter, all of them revivals
        rows += _dying("a.conv2", start, start + 60, 3)
    rows += [*_dying("a.conv2", 100, 200, 4), ("collapsed", "a.conv2", 0, 4, 150, None)]
    run = _with_events(rows)
    (summary,) = summarise([run])
    counts = summary.counts
    assert (counts.deaths, counts.died, counts.revivals, counts.dead) == (7, 5, 4, 3)
    layer = summary.by_layer.loc["a.conv2"]
    assert layer[["deaths", "died", "revivals", "dead"]].tolist() == [7, 5, 4, 3]
    relation = "7 deaths of 5 filters in all: 4 ended in a revival, 3 last to the end."
    judged = verdict([run])
    assert relation in judged.sentences[0].text
    assert judged.facts[0].value == "3" and judged.facts[0].detail.endswith("7 deaths, 4 revivals")
    # Of the seven, two began with the first batch: the claim is about the other five.
    assert "2 of the deaths began with the first batch, 1 of these" in judged.sentences[0].text
    assert "3 of 5 deaths after the first batch ended in a revival" in judged.claims[-1].evidence
    page = html.unescape(build_page([run]))
    assert page.count(relation) == 2  # in the verdict, and above the table of deaths
    assert "3 of 8 filters dead at the end, 5 died at least once" in page
    assert ">7 of 7 deaths<" in page
    found = run_digest(run)
    assert [found[key] for key in ("deaths", "died", "revivals", "dead")] == [7, 5, 4, 3]
    assert found["silent_from_start"] + found["died_later"] == 3
    records = json.loads(export_table([run], "json"))
    assert records[0]["dead"] == 3
    assert zeroout.zero_out_map(summary).dead.iloc[0, -1] == 3


# Layers


def test_what_stands_before_the_activation_is_told_of_the_layers_that_say_it():
    rows = _dying("a.conv2", 300, 600, 1)
    run = _with_events(rows)
    assert "; 1 where an addition stands" in verdict([run]).claims[-1].evidence
    for addition, told in ((False, "0 where an addition stands"), (None, "")):
        layer = DemoLayer("a.conv2", 0, 8, addition)
        run.__dict__["layers"] = (layer,)
        evidence = verdict([run]).claims[-1].evidence
        assert told in evidence and ("addition" in evidence) == bool(told)
    assert "conv2 and downsample" not in build_page([run])


def test_a_layer_whose_name_is_a_number_is_called_a_module():
    assert text.layer_name("2") == "module 2" and text.layer_name("0.3") == "module 0.3"
    assert text.layer_name("layer1.0.conv1") == "layer1.0.conv1"
    run = DemoRun("x", config(), 9.0, 400, 10, shape=(("0", 16), ("2", 32)))
    said = str(verdict([run]).sentences[0])
    assert re.search(r"Most are in module 2 \(\d+ of 32\) and module 0 \(\d+ of 16\)\.", said)
    assert re.search(r"The first death: module \d \(layer \d\)", said)
    assert panels.fig3(summarise([run]), ["2"])[0][0].subject == "layer 1 filters · module 2"


def test_infinite_norms_make_a_page_without_a_warning():
    run = DemoRun("x", config(), 0.3, 200, 2, shape=(("a", 8), ("b", 8)), status="diverged")
    for name in ("weight_norms", "gap_norms"):
        norms = run.weight_norms("b")
        norms.iloc[40:] = np.inf
        norms.iloc[:, 3] = 3e38
        norms.iloc[60:, 1] = np.nan
        object.__setattr__(run, name, lambda *_, norms=norms, **__: norms)
    run.iterations.loc[100:, ["loss", "grad_norm"]] = np.inf
    run.metrics.loc[1:, ["train_loss", "test_loss"]] = np.inf
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        page = build_page([run])
    for island in re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', page, re.S):
        json.loads(island, parse_constant=pytest.fail)


@pytest.mark.parametrize("status", ["running", "interrupted", "diverged", "failed"])
def test_unfinished_runs_are_warned_of(status):
    run = DemoRun("x", config(), 0.1, 100, 10, status=status, extra={"message": "loss is NaN"})
    warning = verdict([run]).warnings[0]
    assert status in warning or (status == "running" and "still training" in warning)
    assert "loss is NaN" in warning


def test_runs_that_differ_in_more_than_the_method_are_warned_of():
    runs = [
        DemoRun("a", config(), 0, 50, 5),
        DemoRun("b", config("pgt", seed=3, epochs=5), 0, 50, 5),
    ]
    warnings = " ".join(verdict(runs).warnings)
    assert "epochs" in warnings and "seed" in warnings


def test_nothing_recorded_yet():
    judged = verdict([DemoRun("new", config(), iteration_count=0, status="running")])
    assert "no iteration is recorded yet" in judged.sentences[0].text


def test_no_deaths():
    judged = verdict([DemoRun("alive", config(), mortality=0, iteration_count=100)])
    assert "none of 4,800 filters died in 100 iterations" in judged.sentences[0].text
    assert judged.claims[-1].judgement == "cannot tell"


# Text and charts


def test_labels_tell_the_runs_apart():
    runs = [
        DemoRun("a", config()),
        DemoRun("b", config("pgt")),
        DemoRun("c", config("pgt", seed=1)),
    ]
    labels = text.run_labels(runs)
    assert len(set(labels)) == 3
    assert text.run_labels([runs[0], runs[0]]) == ["a #1", "a #2"]


def test_labels_name_what_differs_and_nothing_else():
    runs = [
        DemoRun(f"{model}{smoothing}", config("pgt", model=model, label_smoothing=smoothing))
        for model in ("resnet18", "timm/seresnet18")
        for smoothing in (0.0, 0.1)
    ]
    assert text.run_labels(runs) == [
        f"PGT (α 0.25), {model}, smoothing {smoothing}"
        for model in ("resnet18", "seresnet18")
        for smoothing in ("0", "0.1")
    ]


def test_the_default_layers_are_no_gates():
    names = ["conv1", "layer1.0.conv1", "layer1.0.conv2", "layer1.0.se.fc1", "layer1.0.se.fc2"]
    layers = [DemoLayer(name, i, 4) for i, name in enumerate(names)]
    found = panels.resolve_layers(layers, panels.DEFAULT_LAYERS)
    assert [layer.name for layer in found] == ["layer1.0.conv1", "layer1.0.conv2"]


def test_islands_cannot_end_their_element():
    assert text.json_island({"a": "</script>&\u2028", "b": math.nan}) == (
        '{"a":"\\u003c/script\\u003e\\u0026\\u2028","b":null}'
    )


def test_printable_keeps_one_line_without_controls():
    assert printable("a\nb\u202ec\x00") == "a�b�c�"
    assert len(printable("x" * 500)) == MAX_LABEL


def test_long_series_become_few_medians():
    curve = figures.bucketed(pd.Series(np.arange(10_000.0)), 100)
    assert len(curve) == 100
    assert curve.iloc[0] == pytest.approx(49.5)
    assert curve.index[0] in (49, 50)


def test_clipping_is_shown_only_where_something_clips(pair):
    assert figures.clipping(pair) is None
    assert figures.clipping_by_layer(pair) is None
    clipped = summarise(
        [DemoRun("g", config("gc"), 0, 300, 10), DemoRun("c", config("agc"), 0, 300, 10)]
    )
    assert figures.clipping(clipped) is not None
    assert len(figures.clipping_by_layer(clipped).data) == 1
    assert figures.agc_activity(clipped[1])["clipped"].between(0, 100).all()


def test_a_resumed_run_and_replaced_images_are_told():
    extra = {"resumed_from": [120, 640], "bad_images": [{"path": "train/cat/1.jpg"}]}
    (card,) = run_cards(summarise([DemoRun("run", config(), 0.3, 120, 2, extra=extra)]))
    assert "resumed 2 times, last at iteration 640" in card["facts"]
    assert "1 unreadable image replaced by another of its class" in card["facts"]
