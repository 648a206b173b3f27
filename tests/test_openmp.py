"""OpenMP's threads spin while the CPUs are theirs, and sleep while others need them."""

import os
import subprocess
import sys

import pytest

from pgt_diag.openmp import BUSY, IDLE, Contention

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="GNU's OpenMP, on Linux")

_SPINS = """
import time, torch
from pgt_diag.openmp import SleepingTeam

torch.set_num_threads(2)
values = torch.ones(1 << 20)

def spent():
    before = time.process_time()
    for _ in range(20):
        values.neg_()
        time.sleep(0.01)
    return time.process_time() - before

spent()
alone = spent()
team = SleepingTeam()
beside = spent()
team.end()
print(beside / alone, spent() / alone)
"""

_CROWDED = """
import os, subprocess, sys, torch
from pgt_diag import openmp

made = []

class Team(openmp.SleepingTeam):
    def __init__(self):
        made.append(self)
        super().__init__()

openmp.SleepingTeam = Team
torch.set_num_threads(2)
values = torch.ones(1 << 16)
values.neg_()
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
neighbour = subprocess.Popen([sys.executable, "-c", "while True: pass"])
try:
    with openmp.sharing_cpus() as seen:
        for _ in range(1_000_000):
            if seen.is_set():
                break
            values.neg_()
finally:
    neighbour.kill()
print(seen.is_set(), len(made))
"""


def run(code: str, **environment: str) -> str:
    plain = {
        name: value
        for name, value in os.environ.items()
        if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS")
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**plain, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one CPU: OpenMP never spins for long")
def test_a_second_team_that_sleeps_keeps_threads_from_spinning_until_it_ends():
    beside, after = map(float, run(_SPINS).split())
    assert beside < 0.5  # of the CPU's time; about 0.05
    assert after > 2 * beside


def test_a_neighbour_on_the_same_cpu_is_noticed_and_spinning_ends():
    assert run(_CROWDED).split() == ["True", "1"]


@pytest.mark.parametrize("variable", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"])
def test_a_neighbour_is_noticed_and_what_the_user_has_chosen_stands(variable):
    value = "passive" if variable == "OMP_WAIT_POLICY" else "0"
    assert run(_CROWDED, **{variable: value}).split() == ["True", "0"]


def test_others_are_noticed_at_once_and_forgotten_only_when_they_stay_away():
    contention = Contention()
    assert not contention.update(BUSY)
    assert contention.update(BUSY + 0.01)
    between = (BUSY + IDLE) / 2
    calm = IDLE / 2
    shares = [calm, calm, between, calm, calm, calm]
    assert [contention.update(share) for share in shares] == [True] * 5 + [False]
