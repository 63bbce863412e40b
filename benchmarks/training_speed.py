"""Training against transformers: the same weights, tokens and optimizer, in processes that take turns.

8 sequences of 512 random tokens a step, fp32, gradients clipped at 1, fused AdamW, next-token cross entropy alone (the
peer has no balance loss and no MTP). Both ways that the peer has for experts on a CPU are run; it is judged by its
faster one. The first step compiles where compiling is asked for, and is left out.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from benchmarks._result import Proof, Table

if TYPE_CHECKING:  # torch itself loads in the processes, after their settings
    from torch import Tensor

    from fireflyer.config import ModelConfig

ROWS, LENGTH = 8, 512
WARM_UP, ROUNDS, STEPS_A_ROUND = 2, 8, 3
EAGER = {
    "fireflyer": "fireflyer",
    "transformers, eager experts": "transformers eager",
    "transformers, grouped_mm": "transformers grouped_mm",
}
COMPILED = {
    "fireflyer, compiled": "fireflyer compiled",
    "transformers, grouped_mm, compiled": "transformers grouped_mm compiled",
}
FLOORS = {"eager": 1.5, "compiled": 1.1, "matmul_share": 0.40, "memory": 0.75}
TARGETS = {"eager": 2.0, "compiled": 1.4, "matmul_share": 0.60, "memory": 0.60}


def main() -> Proof:
    """Tokens a second, the share of this machine's matrix product rate, and the peak memory of each process."""
    seen = _race(EAGER) | _race(COMPILED)
    losses = {name: run["first_loss"] for name, run in seen.items()}
    assert max(losses.values()) - min(losses.values()) < 1e-5, losses
    rate = median(run["matmul_flops_per_s"] for run in seen.values())
    flops_per_token = seen["fireflyer"]["flops_per_token"]
    speeds = {name: ROWS * LENGTH / median(run["seconds"]) for name, run in seen.items()}
    memory = {name: run["peak_bytes"] for name, run in seen.items()}
    peers = [name for name in EAGER if name != "fireflyer"]
    peer = max(peers, key=speeds.__getitem__)
    ours_compiled, peer_compiled = COMPILED
    reached = {
        "eager": speeds["fireflyer"] / speeds[peer],
        "compiled": speeds[ours_compiled] / speeds[peer_compiled],
        "matmul_share": speeds["fireflyer"] * flops_per_token / rate,
        "memory": memory["fireflyer"] / memory[peer],
    }
    rows = [
        [
            name,
            f"{speed:,.0f}",
            f"{speed / speeds[peer]:.2f}",
            f"{speed * flops_per_token / rate:.0%}",
            f"{memory[name] / 2**30:.2f}",
        ]
        for name, speed in speeds.items()
    ]
    columns = ["training", "tokens/s", f"times {peer}", "of the matrix product rate", "peak GiB"]
    figures = {
        "tokens_per_s": speeds,
        "peak_bytes": memory,
        "first_loss": losses,
        "matmul_flops_per_s": rate,
        "flops_per_token": flops_per_token,
        "reached": reached,
        "floors": FLOORS,
        "targets": TARGETS,
    }
    return Proof(figures, {"speed": Table(columns, rows)}, missed=_missed(reached))


def _missed(reached: dict[str, float]) -> list[str]:
    found = []
    for name, figure in reached.items():
        worse = (lambda a, b: a > b) if name == "memory" else (lambda a, b: a < b)
        if worse(figure, FLOORS[name]):
            found.append(f"{name}: {figure:.2f}, the floor is {FLOORS[name]}")
        elif worse(figure, TARGETS[name]):
            found.append(f"{name}: {figure:.2f}, above the floor, the target is {TARGETS[name]}")
    return found


def _race(contenders: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Every contender in a process of its own, a few steps each in turn; what each measured."""
    context = multiprocessing.get_context("spawn")
    ends, processes = {}, []
    for name, words in contenders.items():
        ours, theirs = context.Pipe()
        process = context.Process(target=_contender, args=(words, theirs), daemon=True)
        process.start()
        processes.append(process)
        ends[name] = ours
        ours.recv()  # ready, its first steps taken
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(ROUNDS):
        for name, end in ends.items():
            end.send(STEPS_A_ROUND)
            seconds[name] += end.recv()
    found = {}
    for name, end in ends.items():
        end.send(0)
        found[name] = end.recv() | {"seconds": seconds[name]}
    for process in processes:
        process.join()
    return found


def _contender(words: str, end: Connection) -> None:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as the command sets it; three waiting processes share the cores
    import torch

    from fireflyer.cost.flops import training_flops_per_token
    from fireflyer.evaluate.machine import measure_matmul_flops_per_s
    from fireflyer.train.summary import peak_memory_bytes

    tokens = torch.randint(4096, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    ids, labels = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    step, config = _ours(words) if words.startswith("fireflyer") else _theirs(words)
    first_loss = step(ids, labels)
    for _ in range(WARM_UP):
        step(ids, labels)
    end.send("ready")
    while steps := end.recv():
        seconds = []
        for _ in range(steps):
            began = time.perf_counter()
            step(ids, labels)
            seconds.append(time.perf_counter() - began)
        end.send(seconds)
    peak = peak_memory_bytes()
    end.send(
        {
            "first_loss": first_loss,
            "peak_bytes": peak,
            "matmul_flops_per_s": measure_matmul_flops_per_s(),
            "flops_per_token": training_flops_per_token(config, LENGTH),
        }
    )


def _ours(words: str) -> tuple[Callable[[Tensor, Tensor], float], ModelConfig]:
    from benchmarks._peer import small_model
    from fireflyer.model.decoder import compile_trunk
    from fireflyer.train.losses import training_losses
    from fireflyer.train.optimizer import DecoderOptimizer, clip_gradients
    from fireflyer.train.settings import OptimizerSettings

    model = small_model()
    optimizer = DecoderOptimizer(model, OptimizerSettings())
    parameters = list(model.parameters())
    trunk = compile_trunk(model) if "compiled" in words else model.trunk

    def step(ids: Tensor, labels: Tensor) -> float:
        terms = training_losses(
            trunk(ids),
            model.head_weight,
            labels,
            None,
            num_experts_per_tok=model.config.num_experts_per_tok,
            valid_in_batch=labels.numel(),
            rows_in_batch=ids.shape[0],
        )
        terms.main.backward()
        clip_gradients(parameters, 1.0)
        optimizer.step(1e-3)
        optimizer.zero_grad()
        return terms.main.item()

    return step, model.config


def _theirs(words: str) -> tuple[Callable[[Tensor, Tensor], float], ModelConfig]:
    import torch
    from torch.nn import functional as F

    from benchmarks._peer import small_model, transformers_model

    with tempfile.TemporaryDirectory() as folder:
        model = transformers_model(Path(folder), words.split()[1])
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    forward = torch.compile(model) if "compiled" in words else model

    def step(ids: Tensor, labels: Tensor) -> float:
        logits = forward(input_ids=ids).logits
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step, small_model().config
