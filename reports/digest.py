"""A report as one JSON object: what `pgt-diag show --json` prints, for scripts.

```
schema_version   1
runs             one object per run
  label, path, name, status, message     label: the run's name in this report
  method, alpha, batch_size, seed        null for a recorder in somebody's own loop
  lr, lr_rule                            peak, and what made it of the batch size; likewise
  iterations, planned_iterations         on disk so far; as planned (null if unknown)
  filters, dead                          of the whole network; dead at the end
  unknown                                filters of which nobody can tell whether they are dead
  silent_from_start, died_later          the two parts of `dead`
  deaths, revivals, died                 deaths = revivals + dead; filters that died at least once
  revived                                filters that were dead and recovered
  first_death                            the first of a filter that had lived, or null: layer,
                                         layer_index, filter, iteration, revival_iteration, cause
  decay_budget                           Σ lr·wd/(1−μ) of the run; 4.6 makes a norm collapse
  best_epoch                             by test accuracy, counted from 1; or the last
  train_accuracy, test_accuracy          of that epoch, in percent
  layers                                 layer, index, filters, dead, silent_from_start, deaths,
                                         revivals, died, unknown, first_death (an iteration)
verdict          sentences (run, text), comparisons, warnings, and claims (statement,
                 judgement, evidence)
table1, table2, table3                   one object per row of the paper's tables, as
                                         `pgt-diag report --format json --table N` writes
```

Numbers are plain; what is missing or not finite is null.
"""

import math
from collections.abc import Sequence
from typing import Any

from reports.exports import plain_records
from reports.layouts import LAYOUTS
from reports.source import Run
from reports.summary import Epoch, RunSummary, summarise
from reports.tables import paper_table
from reports.verdict import verdict

SCHEMA_VERSION = 1


def digest(runs: Sequence[Run], epoch: Epoch = Epoch.BEST) -> dict[str, Any]:
    """Return the verdict and the tables of these runs as plain values, keys as above."""
    judged = verdict(runs, epoch)
    return {
        "schema_version": SCHEMA_VERSION,
        "runs": [_run(summary) for summary in summarise(runs, epoch)],
        "verdict": {
            "sentences": [{"run": each.label, "text": each.text} for each in judged.sentences],
            "comparisons": list(judged.comparisons),
            "claims": [dict(vars(claim)) for claim in judged.claims],
            "warnings": list(judged.warnings),
        },
        **{
            layout.anchor: plain_records(paper_table(layout, runs, epoch))
            for layout in LAYOUTS.values()
        },
    }


def _run(summary: RunSummary) -> dict[str, Any]:
    run, config, accuracy = summary.run, summary.run.config, summary.accuracy
    message, planned = run.info.get("message"), run.info.get("planned_iterations")
    return {
        "label": summary.label,
        "path": str(run.path),
        "name": run.name,
        "status": run.status,
        "message": None if message is None else str(message),
        "method": str(config.method) if config else None,
        "alpha": config.alpha if config and config.method.uses_pgt else None,
        "batch_size": config.batch_size if config else None,
        "seed": config.seed if config else None,
        "lr": config.peak_lr if config else None,
        "lr_rule": str(config.lr_rule) if config else None,
        "iterations": run.iteration_count,
        "planned_iterations": planned if isinstance(planned, int) else None,
        "filters": summary.filters,
        "dead": summary.dead,
        "unknown": len(summary.unknown),
        "silent_from_start": summary.silent_from_start,
        "died_later": summary.dead - summary.silent_from_start,
        "deaths": summary.counts.deaths,
        "revivals": summary.counts.revivals,
        "died": summary.counts.died,
        "revived": len(summary.revived.drop_duplicates(["layer", "filter"])),
        "first_death": _first_death(summary),
        "decay_budget": _finite(summary.budget_since(0)),
        "best_epoch": accuracy.epoch if accuracy else None,
        "train_accuracy": _finite(accuracy.train) if accuracy else None,
        "test_accuracy": _finite(accuracy.test) if accuracy else None,
        "layers": plain_records(summary.by_layer.reset_index()),
    }


def _first_death(summary: RunSummary) -> dict[str, Any] | None:
    death = summary.first_death
    if death is None:
        return None
    values = dict(vars(death))
    return values | {"revival_iteration": values.pop("revival")}


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
