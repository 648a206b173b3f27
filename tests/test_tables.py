"""The paper's tables, computed from runs as the paper computes them; its own values are exact."""

import dataclasses
import math

import pandas as pd
import pytest

from pgt_diag.config import RunConfig
from reports import sections
from reports.claims import judge
from reports.demo import DemoRun
from reports.figures import figure2, figure2_curves, figure2_panels
from reports.intervals import interval95, leaves_zero_out, t95
from reports.layouts import LAYOUTS
from reports.roles import ROLES
from reports.summary import Epoch, summarise
from reports.tables import PAPER_TABLE_2, fitting_layouts, table1, table2, table3
from reports.verdict import verdict

SMALL = (("conv1", 8), ("layer1.0.conv1", 8))


def run(method, test, train=70.0, seed=0, batch=256, status="finished", alpha=0.25, **config):
    values = {"method": method, "seed": seed, "batch_size": batch, "epochs": 2, "alpha": alpha}
    values |= {"warmup_epochs": 0}
    made = DemoRun(
        f"{method}-{seed}", RunConfig.from_mapping(values | config), mortality=0.0,
        iteration_count=40, record_every=4, shape=SMALL, status=status,
    )  # fmt: skip
    # A cached property: what is put here is what the table reads.
    made.__dict__["metrics"] = pd.DataFrame(
        {
            "epoch": [1, 2, 3],
            "train_accuracy": [train - 9, train, train + 5],
            "test_accuracy": [test - 9, test, test - 1],
        }
    )
    return made


def row(table, method, batch=256, runs_only=True):
    found = table[(table["method"] == method) & (table["batch_size"] == batch)]
    found = found[found["runs"] > 0] if runs_only else found
    assert len(found) == 1
    return found.iloc[0]


def test_the_papers_values_and_differences():
    paper = PAPER_TABLE_2.set_index(["batch_size", "method"])
    assert len(paper) == 10
    assert paper.loc[(256, "agc+pgt"), "test_accuracy"] == 68.856
    assert paper.loc[(256, "agc+pgt"), "test_difference"] == pytest.approx(2.06)
    assert paper.loc[(256, "gc+pgt"), "train_difference"] == pytest.approx(-0.19)
    assert paper.loc[(1024, "pgt"), "alpha"] == 0.92
    assert math.isnan(paper.loc[(512, "baseline"), "test_difference"])


def test_means_spreads_and_pairs_over_seeds():
    runs = [run("baseline", 60.0 + seed, seed=seed) for seed in range(3)]
    runs += [run("pgt", 61.0 + 1.5 * seed, seed=seed) for seed in range(3)]
    table = table2(runs)
    pgt = row(table, "pgt")
    assert pgt["runs"] == 3 and pgt["pairs"] == 3
    assert pgt["test_accuracy"] == pytest.approx(62.5)
    assert pgt["test_spread"] == pytest.approx(1.5)
    assert pgt["test_difference"] == pytest.approx(1.5)
    # The differences are 1, 1.5 and 2: t(2) = 4.303, standard deviation 0.5.
    assert pgt["test_interval"] == pytest.approx(4.303 * 0.5 / math.sqrt(3), abs=1e-3)
    assert math.isnan(row(table, "baseline")["test_difference"])


def test_accuracy_is_that_of_the_best_test_epoch():
    table = table2([run("baseline", 60.0, train=70.0)])
    assert row(table, "baseline")["train_accuracy"] == 70.0


def test_only_runs_of_the_same_batch_seed_and_setting_are_paired():
    runs = [
        run("baseline", 60, seed=0),
        run("pgt", 65, seed=1),
        run("pgt", 66, batch=512),
        run("agc", 67, epochs=3),
    ]
    table = table2(runs)
    ours = table[(table["runs"] > 0) & (table["method"] != "baseline")]
    assert len(ours) == 3
    assert ours["pairs"].sum() == 0
    assert ours["test_difference"].isna().all()


def test_missing_cells_are_explicit_and_the_order_is_the_papers():
    table = table2([run("agc+pgt", 61), run("baseline", 60), run("gc", 60.5)])
    assert table["batch_size"].tolist() == [256] * 6 + [1024] * 2 + [512] * 2
    missing = table[table["runs"] == 0]
    assert set(missing["note"]) == {"not run"}
    assert len(missing) == 10 - 3
    ours = table[table["runs"] > 0]["method"].tolist()
    assert ours == ["baseline", "gc", "agc+pgt"]
    assert row(table, "gc")["paper_test_accuracy"] == 67.064


def test_unfinished_runs_are_left_out_and_named():
    runs = [run("baseline", 60), run("pgt", 62), run("pgt", 1, seed=1, status="diverged")]
    pgt = row(table2(runs), "pgt")
    assert pgt["test_accuracy"] == 62
    assert pgt["note"] == "left out: 1 diverged"
    running = row(table2([run("pgt", 62, status="running")]), "pgt")
    assert running["note"] == "best so far, 1 running"
    failed = run("pgt", 62, status="diverged")
    failed.__dict__["metrics"] = pd.DataFrame()
    assert row(table2([failed]), "pgt")["note"] == "1 diverged"


def test_best_values_are_marked_per_batch_size():
    # By seed, PGT is 2 and 1.9 above the baseline, and GC 1 below it or 1 above.
    runs = [run("baseline", 60, train=72), run("pgt", 62, train=71), run("gc", 59, train=70)]
    runs += [
        run("baseline", 60, train=72, seed=1), run("pgt", 61.9, train=71, seed=1),
        run("gc", 58.9, train=70, seed=1),
    ]  # fmt: skip
    table = table2(runs)
    assert row(table, "pgt")["best_test_accuracy"]
    assert row(table, "baseline")["best_train_accuracy"]
    assert row(table, "pgt")["best_test_difference"]
    # No method gained in training accuracy, so no gain is the largest.
    assert not table["best_train_difference"].any()
    assert row(table, "agc+pgt", runs_only=False)["best_paper_test_accuracy"]


def test_one_row_alone_is_not_the_best():
    runs = [run("baseline", 60, seed=seed) for seed in range(3)]
    assert not table2(runs)["best_test_accuracy"].any()


@pytest.mark.parametrize("differences", [(2.0,), (2.0, -1.0), (2.0, 0.1), (5.0, 1.0, -0.5)])
def test_nothing_is_called_the_best_that_may_be_chance(differences):
    runs = [run("baseline", 60, seed=seed) for seed in range(len(differences))]
    runs += [run("pgt", 60 + more, seed=seed) for seed, more in enumerate(differences)]
    table = table2(runs)
    ours = table[table["runs"] > 0]
    for part in ("train", "test"):
        assert not ours[f"best_{part}_accuracy"].any()
        assert not ours[f"best_{part}_difference"].any()
    assert table["best_paper_test_accuracy"].any(), "the paper's own marks stay"


def test_copies_of_one_seed_are_one_observation():
    runs = [run("pgt", 61), run("pgt", 61), run("pgt", 61), run("baseline", 60)]
    pgt = row(table2(runs), "pgt")
    assert (pgt["runs"], pgt["seeds"], pgt["pairs"]) == (3, 1, 1)
    assert math.isnan(pgt["test_spread"]) and math.isnan(pgt["test_interval"])
    assert pgt["note"] == "3 runs of one seed"
    runs += [run("pgt", 64, seed=1), run("baseline", 60, seed=1)]
    pgt = row(table2(runs), "pgt")
    # The means of the seeds are 61 and 64: mean 62.5 over seeds, not 61.75 over runs.
    assert (pgt["test_accuracy"], pgt["test_difference"]) == (62.5, 2.5)
    assert pgt["test_spread"] == pytest.approx(3 / math.sqrt(2))
    assert pgt["test_interval"] == pytest.approx(12.706 * 1.5)
    assert pgt["note"] == "4 runs of 2 seeds"


def on(data, made):
    """Return the run as one that was trained on this data."""
    object.__setattr__(made, "extra", {"data": data})
    return made


FOLDER = {
    "name": "imagefolder", "classes": ["cat", "dog"], "train_images": 900, "test_images": 100,
    "image_size": 224, "source": "/somewhere/cats",
}  # fmt: skip
DIGESTS = {"train_digest": "0123456789abcdef", "test_digest": "fedcba9876543210"}


@pytest.mark.parametrize(
    ("other", "paired"),
    [
        ({"source": "/elsewhere/cats"}, True),
        ({"classes": [str(i) for i in range(1000)]}, False),
        ({"train_images": 901}, False),
        ({"test_images": 99}, False),
        ({"image_size": 128}, False),
        (DIGESTS, True),
        (DIGESTS | {"train_digest": "0" * 16}, False),
        (DIGESTS | {"test_digest": "0" * 16}, False),
        (DIGESTS | {"image_size": 128}, False),
    ],
)
def test_only_runs_on_the_same_images_are_paired(other, paired):
    first = FOLDER | (DIGESTS if "train_digest" in other else {})
    values = {"dataset": "imagefolder", "data": "x"}
    baseline = on(first, run("baseline", 60, **values))
    pgt = on(FOLDER | other, run("pgt", 61, **values | {"data": "y"}))
    table = table2([baseline, pgt])
    assert row(table, "pgt")["pairs"] == paired
    warnings = verdict([baseline, pgt]).warnings
    assert any("differ in their data" in each for each in warnings) is not paired
    comparisons = verdict([baseline, pgt]).comparisons
    assert bool(comparisons) is paired


def test_runs_on_other_images_are_no_repetitions():
    runs = [on(FOLDER | {"train_images": 900 + seed}, run("pgt", 61, seed=seed)) for seed in (0, 1)]
    ours = table2(runs).query("runs > 0")
    assert ours["runs"].tolist() == [1, 1]
    assert [text.split(", ")[-2] for text in ours["setting"]] == [
        "data of 900 train images", "data of 901 train images"
    ]  # fmt: skip


def test_a_run_from_before_digests_is_compared_by_what_it_recorded():
    old = on(FOLDER, run("baseline", 60))
    new = on(FOLDER | DIGESTS, run("pgt", 61))
    assert row(table2([old, new]), "pgt")["pairs"] == 1


def test_made_up_images_of_other_numbers_are_other_data():
    values = {"dataset": "synthetic", "synthetic_images": 800}
    runs = [run("baseline", 60, **values), run("pgt", 61, **values, synthetic_classes=400)]
    assert row(table2(runs), "pgt")["pairs"] == 0


@pytest.mark.parametrize(("key", "value"), [("amp", "fp16"), ("accumulate", 4), ("min_spell", 50)])
def test_what_may_be_the_cause_besides_the_method_is_named(key, value):
    pgt = row(table2([run("baseline", 60), run("pgt", 61, **{key: value})]), "pgt")
    assert pgt["note"] == f"differs from its baseline in {key.replace('_', ' ')} too"


def test_the_precision_is_the_one_trained_with_not_the_one_asked_for():
    runs = [run("baseline", 60), run("pgt", 61)]
    for made, amp in zip(runs, ("off", "bf16"), strict=True):
        object.__setattr__(made, "extra", {"amp": amp})
    assert row(table2(runs), "pgt")["note"] == "differs from its baseline in amp too"


def test_every_field_of_a_configuration_has_exactly_one_role():
    roles = [name for role in ROLES.values() for name in role]
    assert sorted(roles) == sorted(field.name for field in dataclasses.fields(RunConfig))


def test_different_alphas_are_different_rows():
    table = table2([run("pgt", 61, alpha=0.25), run("pgt", 62, alpha=0.5)])
    assert table[table["runs"] > 0]["alpha"].tolist() == [0.25, 0.5]


def test_another_learning_rate_is_another_row_and_not_a_seed():
    table = table2([run("pgt", 61, lr=0.1), run("pgt", 63, lr=0.2), run("pgt", 62, seed=1, lr=0.1)])
    ours = table[table["runs"] > 0]
    assert ours["variant"].tolist() == ["lr 0.1", "lr 0.2"]
    assert ours["runs"].tolist() == [2, 1]
    assert table2([run("pgt", 61, lr=0.1)])["variant"].iloc[0] == ""
    # Rows of two methods at two rates: each says its own,
    table = table2([run("baseline", 60, lr=0.1), run("pgt", 61, lr=0.02)])
    assert table[table["runs"] > 0]["variant"].tolist() == ["lr 0.1", "lr 0.02"]


def test_pairs_prefer_the_baseline_of_the_same_recipe_and_never_mix_recipes():
    baselines = [run("baseline", 60, lr=0.1), run("baseline", 50, lr=0.2)]
    pgt = row(table2([*baselines, run("pgt", 61, lr=0.1)]), "pgt")
    assert pgt["test_difference"] == pytest.approx(1)
    assert pgt["note"] == ""
    assert row(table2([*baselines, run("pgt", 61, lr=0.3)]), "pgt")["pairs"] == 0
    other = row(table2([baselines[0], run("pgt", 61, lr=0.3)]), "pgt")
    assert other["test_difference"] == pytest.approx(1)
    assert other["note"] == "differs from its baseline in lr too"


def test_a_run_without_configuration_or_metrics_has_a_row():
    table = table2([DemoRun("mine", None, iteration_count=0, shape=SMALL)])
    ours = table[table["runs"] > 0].iloc[0]
    assert ours["method"] == "mine"
    assert pd.isna(ours["batch_size"])


def test_no_runs_leave_only_the_paper():
    assert (table2([])["runs"] == 0).all()


def test_interval_needs_two_values():
    assert math.isnan(interval95([1.0]))
    assert interval95([1.0, 1.0, 1.0]) == 0
    assert interval95(range(40)) == pytest.approx(2.0227 * 11.69 / math.sqrt(40), rel=1e-3)


def test_the_quantiles_are_students_at_every_n():
    scipy = pytest.importorskip("scipy.stats")
    for freedom in (*range(1, 60), 100, 1000, 10**6):
        assert t95(freedom) == pytest.approx(scipy.t.ppf(0.975, freedom), abs=6e-4)


def test_a_difference_is_more_than_chance_where_its_interval_leaves_0_out():
    assert not leaves_zero_out([]) and not leaves_zero_out([5.0])
    assert not leaves_zero_out([-22.0, -23.0, 40.0]) and not leaves_zero_out([2.0, 3.0])
    assert leaves_zero_out([-2.0, -3.0, -2.0]) and leaves_zero_out([2.0, 2.0])


# Tables 1 and 3: networks with batch normalisation


def normalised(method, test, model="resnet50", **values):
    return run(method, test, model=model, norm="batch", batch=1024, **values)


def test_the_papers_tables_1_and_3_as_printed():
    table = LAYOUTS[1].paper.set_index(["model", "schedule", "method"])
    assert len(table) == 14
    # Its printed differences, from its printed accuracies.
    printed = {
        ("timm/seresnet50", "cosine"): (0.97, 0.734),
        ("resnet50", "cosine"): (0.5, 0.656),
        ("resnet50", "step"): (0.57, 0.524),
        ("resnet101", "cosine"): (0.81, 0.362),
        ("timm/seresnet18", "cosine"): (0.18, 0.346),
        ("resnet18", "step"): (0.35, 0.14),
        ("resnet18", "cosine"): (0.15, 0.09),
    }
    for network, differences in printed.items():
        pgt = table.loc[(*network, "pgt")]
        assert (pgt["train_difference"], pgt["test_difference"]) == pytest.approx(differences)
    gaps = [3.02, 3.066, 2.62, 2.112, 2.544, 1.502, 2.464, 1.3]
    assert LAYOUTS[3].paper["gap"].tolist() == pytest.approx(gaps)


def test_table_1_pairs_within_network_and_schedule_and_sets_the_papers_beside():
    runs = [normalised("baseline", 70.0 + seed, seed=seed) for seed in (0, 1)]
    runs += [normalised("pgt", 71.0 + seed, seed=seed, alpha=0.05) for seed in (0, 1)]
    runs += [normalised("baseline", 60, schedule="step"), normalised("pgt", 63, schedule="step")]
    runs.append(normalised("pgt", 90, model="resnet18"))
    table = table1(runs)
    ours = table[table["runs"] > 0].set_index(["model", "schedule", "method"])
    cosine = ours.loc[("resnet50", "cosine", "pgt")]
    assert (cosine["runs"], cosine["pairs"], cosine["test_difference"]) == (2, 2, 1)
    assert cosine["paper_test_accuracy"] == 77.216
    step = ours.loc[("resnet50", "step", "pgt")]
    assert (step["test_difference"], step["note"]) == (3, "")
    # The paper has no ResNet-50 in steps at 0.25, and this ResNet-18 no baseline.
    assert math.isnan(step["paper_test_accuracy"])
    assert math.isnan(ours.loc[("resnet18", "cosine", "pgt"), "test_difference"])
    assert list(ours.index)[:2] == [
        ("resnet50", "cosine", "baseline"),
        ("resnet50", "cosine", "pgt"),
    ]
    missing = table[table["runs"] == 0]
    # Of the 14 rows, the two baselines of ResNet-50, PGT at 0.05 and ResNet-18's PGT are there.
    assert len(missing) == 14 - 4 and missing.index.min() == len(ours)


def test_table_3_crosses_schedule_and_smoothing_and_has_the_gap():
    runs = [
        normalised("baseline", 60, train=75),
        normalised("baseline", 62, train=74, label_smoothing=0.1),
        normalised("pgt", 63, train=73, label_smoothing=0.1, alpha=0.3),
        normalised("agc", 99),
        normalised("baseline", 50, model="resnet18"),
    ]
    table = table3(runs)
    ours = table[table["runs"] > 0]
    assert ours["method"].tolist() == ["baseline", "baseline", "pgt"]
    assert ours["gap"].tolist() == [15, 12, 10]
    assert ours["paper_gap"].tolist() == pytest.approx([2.62, 2.112, 1.502])
    assert ours["test_difference"].tolist()[2] == 1
    assert (table["runs"] == 0).sum() == 5
    # Table 1 tells smoothed labels as another setting, without the paper's values.
    smoothed = table1(runs).query("label_smoothing > 0")
    assert smoothed["setting"].str.contains("label smoothing 0.1").all()
    assert smoothed["paper_test_accuracy"].isna().all()


def test_runs_are_in_the_tables_that_are_about_their_networks():
    plain, with_norm = run("pgt", 60), normalised("pgt", 60, model="resnet18")
    smoothed = normalised("pgt", 60, model="resnet18", label_smoothing=0.1)
    numbers = [
        [layout.number for layout in fitting_layouts(runs)]
        for runs in ([], [plain], [with_norm], [plain, with_norm], [with_norm, smoothed])
    ]
    assert numbers == [[2], [2], [1], [1, 2], [1, 3]]
    assert (table2([with_norm])["runs"] == 0).all() and (table1([plain])["runs"] == 0).all()


def test_the_last_epoch_can_be_told_instead_of_the_best():
    runs = [run("baseline", 60.0, train=70.0)]
    last = row(table2(runs, Epoch.LAST), "baseline")
    assert (last["train_accuracy"], last["test_accuracy"]) == (75, 59)


@pytest.mark.parametrize(
    ("configs", "told"),
    [
        ([{"batch": 256}], "lr 0.1 (constant)"),
        ([{"batch": 256}, {"batch": 512}], "lr 0.1 at every batch size (constant)"),
        (
            [{"batch": 256, "lr": 0.1}, {"batch": 512, "lr": 0.2}],
            "lr 0.1 at 256, 0.2 at 512 (linear in the batch size)",
        ),
        (
            [{"batch": 256, "lr": 0.1}, {"batch": 512, "lr": 0.3}],
            "lr 0.1 at 256, 0.3 at 512 (chosen for each)",
        ),
        (
            [{"batch": size, "lr": 0.4, "lr_rule": "linear", "lr_base_batch": 1024}
             for size in (256, 512)],
            "lr 0.1 at 256, 0.2 at 512 (linear in the batch size, from 0.4 at 1024)",
        ),
    ],
)  # fmt: skip
def test_the_setting_says_what_made_the_learning_rates(configs, told):
    runs = [run("baseline", 60, **values) for values in configs]
    settings = set(table2(runs).query("runs > 0")["setting"])
    assert {setting.partition(", lr")[0] for setting in settings} == {
        "resnet18, digits, 2 epochs, stem imagenet"
    }
    assert all(setting.endswith(f", {told}") for setting in settings)


def test_the_same_rate_by_either_rule_is_the_same_recipe():
    scaled = {"lr": 0.4, "lr_rule": "linear", "lr_base_batch": 1024}
    pgt = row(table2([run("baseline", 60, lr=0.1), run("pgt", 61, **scaled)]), "pgt")
    assert pgt["test_difference"] == pytest.approx(1)
    assert pgt["note"] == ""


# Figure 2


def test_figure_2_has_means_by_epoch_of_pgt_and_its_baseline():
    runs = [normalised("baseline", 60.0 + 2 * seed, seed=seed) for seed in (0, 1)]
    runs += [normalised("pgt", 66.0, alpha=0.3), normalised("pgt", 64.0, alpha=0.3, epochs=1)]
    runs += [run("pgt", 99), run("baseline", 99)]  # not of Fig. 2: no batch normalisation
    runs += [normalised("pgt", 50, model="resnet18")]  # no baseline
    ((title, panel),) = figure2_panels(summarise(runs))
    assert title == "resnet50, cosine, digits, batch 1024" and len(panel) == 4
    curves = figure2_curves(panel)
    assert list(curves) == [
        "Baseline, 2 epochs", "PGT (α 0.3), 2 epochs", "PGT (α 0.3), 1 epoch"
    ]  # fmt: skip
    assert curves["Baseline, 2 epochs"]["test_accuracy"].tolist() == [52, 61, 60]
    assert [trace.line.dash for trace in figure2(curves).data] == ["dot", "solid"] * 3
    assert figure2(curves).layout.xaxis.type == figure2(curves).layout.yaxis.type == "log"


def test_figure_2_says_when_pgt_has_what_the_baseline_has_at_its_best():
    islands = {}
    runs = [normalised("baseline", 61), normalised("pgt", 66)]
    (panel,) = sections.figure2(summarise(runs), islands)
    # By epoch 61 − 9, 61, 60 against 66 − 9, 66, 65; their epochs are numbered from 1.
    assert panel["sentences"] == [
        "PGT (α 0.25): at epoch 3 it has the 61.00 % that Baseline has at its best, epoch 3."
    ]
    assert panel["id"] in islands
    assert sections.figure2(summarise(runs[:1]), islands) is None


def test_claims_are_judged_by_the_networks_that_they_are_about():
    def judged(runs):
        return {claim.statement[:30]: claim.judgement for claim in judge(summarise(runs))}

    plain = [run("baseline", 60, seed=seed) for seed in (0, 1)]
    plain += [run("pgt", 61, seed=seed) for seed in (0, 1)]
    with_norm = [normalised("baseline", 60, seed=seed) for seed in (0, 1)]
    with_norm += [normalised("pgt", 59, seed=seed) for seed in (0, 1)]
    assert judged(plain)["PGT improves test accuracy (Tab"[:30]] == "leans towards"
    assert judged(with_norm) == {"PGT improves test accuracy wit": "leans against"}
    both = judged(plain + with_norm)
    assert both["PGT improves test accuracy (Ta"] == "leans towards"
    assert both["PGT improves test accuracy wit"] == "leans against"
