"""The memory that one iteration frees is there for the next, without the system clearing it."""

import subprocess
import sys
from pathlib import Path

import pytest

from pgt_diag.allocator import keep_freed_memory

FAULTS = """
import resource, sys
import torch
from pgt_diag.allocator import keep_freed_memory

if sys.argv[1] == "kept":
    assert keep_freed_memory()
for _ in range(10):
    torch.ones(1 << 23)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.ones(1 << 23)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not keep_freed_memory(), reason="this C library has no mallopt")
def test_kept_memory_takes_no_page_faults_again() -> None:
    faults = {}
    for name in ("kept", "default"):
        command = [sys.executable, "-c", FAULTS, name]
        root = Path(__file__).parent.parent
        faults[name] = int(
            subprocess.run(command, cwd=root, capture_output=True, check=True).stdout
        )
    # 20 × 32 MiB, in pages of 4 KiB or, where they are huge, of 2 MiB.
    assert faults["default"] >= 300
    assert faults["kept"] < faults["default"] / 10
