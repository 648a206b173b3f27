"""A sweep as a Slurm job array: one `pgt-diag train --resume auto` per row.

Standard library only.
"""

import hashlib
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from pgt_diag import storage
from pgt_diag.sweep.grid import Row

SETUP_FILE = "setup.sh"
"""A user's own, in the sweep's folder: what a task does before its run, such as module load."""
_MOST_TASKS = 1000
"""Of an array, where a cluster has not set another MaxArraySize than Slurm's own, 1001."""


def write_job_arrays(
    rows: Sequence[Row],
    folder: Path,
    *,
    processes: int = 1,
    accept_changed_data: bool = False,
    cpus_per_run: float | None,
    gpus_per_run: float | None,
) -> list[Path]:
    """Write the rows' commands and scripts for `sbatch` into the sweep's folder; return these.

    One script, or several where the rows are more than Slurm takes as one array; earlier ones are
    removed, of which Slurm keeps what was submitted. A row that runs into its time limit, or is
    preempted, writes a checkpoint and is put back into the queue, where it goes on. The tasks use
    the pgt-diag of this process, wherever they are submitted from.
    """
    folder = folder.absolute()
    parts = [rows[start : start + _MOST_TASKS] for start in range(0, len(rows), _MOST_TASKS)]
    for old in folder.glob("sweep-[0-9]*.sbatch"):
        old.unlink()
    return [
        _write_job_array(
            part,
            folder / f"sweep{f'-{number}' if number > 1 else ''}.sbatch",
            processes,
            cpus_per_run,
            gpus_per_run,
            accept_changed_data=accept_changed_data,
        )
        for number, part in enumerate(parts, 1)
    ]


def _write_job_array(
    rows: Sequence[Row],
    path: Path,
    processes: int,
    cpus_per_run: float | None,
    gpus_per_run: float | None,
    *,
    accept_changed_data: bool,
) -> Path:
    folder = path.parent
    storage.make_folder(folder)
    more = ["--accept-changed-data"] if accept_changed_data else []
    commands = [[*row.anywhere().command(folder / row.name, processes), *more] for row in rows]
    lines = "".join(f"{shlex.join(command)}\n" for command in commands).encode()
    # Named by content: a job array that still waits keeps the rows that it was submitted with.
    rows_file = folder / f"rows-{hashlib.sha256(lines).hexdigest()[:8]}.txt"
    storage.write(rows_file, lines)
    wanted = [f"#SBATCH --cpus-per-task={cpus_per_run:.0f}"] if cpus_per_run else []
    wanted += [f"#SBATCH --gpus-per-node={gpus_per_run:.0f}"] if gpus_per_run else []
    # A space would end the value of an #SBATCH line.
    log = shlex.quote(str(folder / "slurm-%A_%a.log"))
    script = _SCRIPT.format(
        name=shlex.quote(f"pgt-diag-{folder.name}"),
        count=len(rows),
        log=log,
        wanted="".join(f"{line}\n" for line in wanted),
        rows=shlex.quote(str(rows_file)),
        setup=shlex.quote(str(folder / SETUP_FILE)),
        programs=shlex.quote(str(Path(sys.executable).parent)),
    )
    storage.write(path, script.encode())
    return path


_SCRIPT = """\
#!/bin/bash
# Made by `pgt-diag sweep --engine slurm`. Submit with: sbatch --time=... THIS_FILE
#SBATCH --job-name={name}
#SBATCH --array=1-{count}
#SBATCH --output={log}
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:USR1@60
{wanted}
row=$(sed -n "${{SLURM_ARRAY_TASK_ID}}p" {rows})
if [ -z "$row" ]; then
  echo "$(basename {rows}) has no row $SLURM_ARRAY_TASK_ID; run pgt-diag sweep again" >&2
  exit 2
fi
# The pgt-diag that wrote this; then whatever a cluster needs besides, such as module load.
PATH={programs}:"$PATH"
if [ -e {setup} ]; then . {setup}; fi

# Slurm tells this shell a minute before the end; training then stops with a checkpoint, and goes
# on when its turn comes again. After SIGTERM (a preemption, scancel) Slurm decides that itself.
late=
trap 'late=1; kill -USR1 "$run" 2>/dev/null' USR1
trap 'kill -TERM "$run" 2>/dev/null' TERM
eval "exec $row" &
run=$!
wait "$run"; code=$?
while kill -0 "$run" 2>/dev/null; do wait "$run"; code=$?; done
# A signal ends a wait as well: the run's own code is what a further one returns, if it does.
wait "$run" 2>/dev/null; again=$?
if [ "$again" -ne 127 ]; then code=$again; fi

# 138 is SIGUSR1 before Python listened to it.
case "$late $code" in "1 130"|"1 138")
  command -v scontrol >/dev/null && scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID"
esac
exit "$code"
"""
