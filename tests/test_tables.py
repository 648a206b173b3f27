"""Table 2 is computed from runs as the paper computes it, and the paper's own values are exact."""

import math

import pandas as pd
import pytest

from pgt_diag.config import RunConfig
from reports.demo import DemoRun
from reports.tables import PAPER_TABLE_2, interval95, table2

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


def test_best_values_are_marked_per_batch_size():
    runs = [run("baseline", 60, train=72), run("pgt", 62, train=71), run("gc", 59, train=70)]
    table = table2(runs)
    assert row(table, "pgt")["best_test_accuracy"]
    assert row(table, "baseline")["best_train_accuracy"]
    assert row(table, "pgt")["best_test_difference"]
    # No method gained in training accuracy, so no gain is the largest.
    assert not table["best_train_difference"].any()
    assert row(table, "agc+pgt", runs_only=False)["best_paper_test_accuracy"]


def test_different_alphas_are_different_rows():
    table = table2([run("pgt", 61, alpha=0.25), run("pgt", 62, alpha=0.5)])
    assert table[table["runs"] > 0]["alpha"].tolist() == [0.25, 0.5]


def test_another_learning_rate_is_another_row_and_not_a_seed():
    table = table2([run("pgt", 61, lr=0.1), run("pgt", 63, lr=0.2), run("pgt", 62, seed=1, lr=0.1)])
    ours = table[table["runs"] > 0]
    assert ours["variant"].tolist() == ["lr 0.1", "lr 0.2"]
    assert ours["runs"].tolist() == [2, 1]
    assert table2([run("pgt", 61, lr=0.1)])["variant"].iloc[0] == ""


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
    assert interval95(range(40)) == pytest.approx(1.96 * 11.69 / math.sqrt(40), rel=1e-3)
