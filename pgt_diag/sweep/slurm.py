"""A sweep as a Slurm job array: one `pgt-diag train --resume auto` per row.

Standard library only.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path

from pgt_diag import storage
from pgt_diag.sweep.grid import Row

SCRIPT_FILE = "sweep.sbatch"
ROWS_FILE = "rows.txt"


def write_job_array(
    rows: Sequence[Row],
    folder: Path,
    *,
    processes: int = 1,
    cpus_per_run: float | None,
    gpus_per_run: float | None,
) -> Path:
    """Write the rows' commands and the script for `sbatch` into the sweep's folder; return it.

    A row that runs into its time limit, or is preempted, writes a checkpoint and is put back
    into the queue, where it goes on.
    """
    folder = folder.absolute()
    storage.make_folder(folder)
    lines = [shlex.join(row.command(folder / row.name, processes)) for row in rows]
    # The rows first: a script never counts more than there are.
    storage.write(folder / ROWS_FILE, "".join(f"{line}\n" for line in lines).encode())
    wanted = [f"#SBATCH --cpus-per-task={cpus_per_run:.0f}"] if cpus_per_run else []
    wanted += [f"#SBATCH --gpus-per-node={gpus_per_run:.0f}"] if gpus_per_run else []
    # A space would end the value of an #SBATCH line.
    log = shlex.quote(str(folder / "slurm-%A_%a.log"))
    script = _SCRIPT.format(
        name=shlex.quote(f"pgt-diag-{folder.name}"),
        count=len(rows),
        log=log,
        wanted="".join(f"{line}\n" for line in wanted),
        rows=shlex.quote(str(folder / ROWS_FILE)),
    )
    path = folder / SCRIPT_FILE
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
  echo "rows.txt has no row $SLURM_ARRAY_TASK_ID; run pgt-diag sweep again" >&2
  exit 2
fi

# Slurm tells this shell a minute before the end; training then stops with a checkpoint.
stopped=
trap 'stopped=1; kill -USR1 "$run" 2>/dev/null' USR1 TERM
eval "exec $row" &
run=$!
wait "$run"; code=$?
while kill -0 "$run" 2>/dev/null; do wait "$run"; code=$?; done

if [ -n "$stopped" ] && [ "$code" -eq 130 ] && command -v scontrol >/dev/null; then
  scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_${{SLURM_ARRAY_TASK_ID}}"
fi
exit "$code"
"""
