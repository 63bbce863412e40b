"""`fleet.job()`: stops at a step's end, in the main process only, all ranks at the same step."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

LOOP = """
import os, sys, time
from fireflyer import fleet
assert "torch" not in sys.modules
with fleet.job() as job:
    for step in job.steps(int(sys.argv[1])):
        if step == 0:
            if os.fork() == 0:  # a loader's worker
                time.sleep(0.6)
                print("worker lived, asked:", job.should_stop(), flush=True)
                os._exit(0)
            print("ready", flush=True)
        time.sleep(0.02)
        if BODY:
            job.saved(step + 1)
            print("saved", step + 1, flush=True)
print("end", flush=True)
"""


def run(body: str, steps: int, stop: bool, **env: str) -> tuple[int, list[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", LOOP.replace("BODY", body), str(steps)],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, **env},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    if stop:
        time.sleep(0.1)
        os.killpg(process.pid, signal.SIGTERM)
    lines = process.stdout.read().splitlines()
    return process.wait(), lines


def test_stops_at_a_step_and_says_75(tmp_path: Path):
    code, lines = run("job.should_stop()", 1000, True, FIREFLYER_FLEET_ATTEMPT=str(tmp_path))
    assert code == 75
    assert "worker lived, asked: False" in lines  # TERM came to it as well, and it went on (pains 10, 17)
    saved = next(int(line.split()[1]) for line in lines if line.startswith("saved"))
    assert sum(line.startswith("saved") for line in lines) == 1
    assert json.loads((tmp_path / "saved.json").read_text())["step"] == saved < 1000


def test_runs_to_the_end_undisturbed():
    code, lines = run("job.should_stop()", 3, False)
    assert (code, lines[0]) == (0, "end")


def test_a_loop_that_never_asks_does_not_claim_to_have_saved():
    """It ran on, so TERM had no effect but at the end; 75 would say that it saved."""
    code, _ = run("False", 40, True)
    assert code == 0  # all 40 steps are done


RANKS = """
import os, sys, time
from datetime import timedelta
import torch, torch.distributed as dist
from fireflyer import fleet
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2,
                        timeout=timedelta(seconds=60))
def any_rank(mine):
    flag = torch.tensor([int(mine)])
    dist.all_reduce(flag, dist.ReduceOp.MAX)
    return bool(flag.item())
try:
    with fleet.job(agree=any_rank) as job:
        for step in job.steps(100000):
            if step == 5: print("ready", flush=True)
            if job.should_stop():
                print("stopped", step, flush=True)
finally:
    dist.barrier()
    dist.destroy_process_group()
"""


def test_ranks_agree_on_the_step(tmp_path: Path):
    """TERM reaches one rank only, and both leave at the same step, the group shut down first (pains 9, 11)."""
    pytest.importorskip("torch")
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANKS, str(rank), str(tmp_path / "meet")], stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    for process in ranks:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    ranks[1].send_signal(signal.SIGTERM)
    said = [process.communicate(timeout=60)[0] for process in ranks]
    assert said[0] == said[1]
    assert said[0].startswith("stopped ")
    assert [process.returncode for process in ranks] == [75, 75]
