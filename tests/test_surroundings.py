"""Training where little is there: no home, nobody else's permissions, an unusual environment."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pgt_diag
from tests.sweeps import ROOT, TINY

OPTIONS = [
    f"--{key.replace('_', '-')}={value}"
    for key, value in {**TINY, "epochs": 1, "synthetic_images": 16, "warmup_epochs": 0}.items()
]


def test_a_run_needs_no_home_and_keeps_to_a_strict_umask(tmp_path: Path) -> None:
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "TMPDIR") if name in os.environ}
    result = subprocess.run(
        [sys.executable, "-m", "pgt_diag", "train", *OPTIONS, "--run-dir=run"],
        cwd=tmp_path,
        env={**kept, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        umask=0o077,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert pgt_diag.load_run(tmp_path / "run").status == "finished"
    for path in [tmp_path / "run", *(tmp_path / "run").rglob("*")]:
        allowed = stat.S_IMODE(path.stat().st_mode)
        assert allowed == (0o700 if path.is_dir() else 0o600), path
