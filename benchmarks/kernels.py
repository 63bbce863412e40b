"""The native kernels beside torch's own, at DeepSeek-V2-Lite's shapes, and beside what this machine's memory gives.

Few rows stream weights from memory, so they are measured in bytes a second over weights that no cache holds; many rows
in operations a second. In every round each contender has its turn, and so has plain reading; figures are medians.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks._result import Proof, Table
from fireflyer.numerics.integer import Kind, PackedShape, expert_shapes
from fireflyer.numerics.native.library import ExpertTable, Library, dense_matrix, library, packed_matrix

HIDDEN, WIDTH, EXPERTS, TOP_K = 2048, 1408, 64, 6
OUT = 2 * WIDTH  # gate and up of one expert
STREAMED = 1 << 29  # bytes of weights that a pass goes through
ROUNDS = 9
FEW, MANY, TOKENS = (1, 4, 16), (48, 512), (1, 4, 16, 512)
KINDS: tuple[Kind, ...] = ("int8", "int4")


@dataclass(frozen=True)
class Contender:
    """run(x, i) is the product of x with the i-th weight."""

    name: str
    bytes_each: int
    count: int
    run: Callable[[Tensor, int], object]

    def seconds(self, x: Tensor) -> float:
        """Of one product: the median of a pass over all weights."""
        return median(_seconds(partial(self.run, x, i)) for i in range(self.count))


def main() -> Proof:
    torch.manual_seed(0)
    native = library()
    if native is None:
        raise SystemExit("the native kernels are not built: make native")
    missed: list[str] = []
    few, read = _few_rows(native)
    many = _many_rows(native)
    layer = _layers(native)
    for kind in KINDS:
        share = few[f"native {kind}"]["1"] / read
        if share < 0.9:
            missed.append(f"{kind} with one row at 90% of the readable bandwidth: {share:.0%}")
    figures = {
        "level": native.level,
        "threads": torch.get_num_threads(),
        "read_gb_per_s": read,
        "few_rows_gb_per_s": few,
        "many_rows_gop_per_s": many,
        "experts_ms": layer,
    }
    return Proof(figures, _tables(read, few, many, layer), missed=missed)


def _tables(
    read: float, few: dict[str, dict[str, float]], many: dict[str, dict[str, float]], layer: dict[str, dict[str, float]]
) -> dict[str, Table]:
    def shares(name: str) -> list[str]:
        return [f"{few[name][str(m)]:.1f} ({few[name][str(m)] / read:.0%})" for m in FEW]

    few_table = Table(
        [f"GB/s, {OUT} × {HIDDEN}", *(f"{m} rows" if m > 1 else "1 row" for m in FEW)],
        [["plain reading", f"{read:.1f}", "", ""], *([name, *shares(name)] for name in few)],
    )
    many_table = Table(
        [f"GOP/s, {OUT} × {HIDDEN}", *(f"{m} rows" for m in MANY)],
        [[name, *(f"{many[name][str(m)]:,.0f}" for m in MANY)] for name in many],
    )
    layer_table = Table(
        ["routed experts of one layer, ms", *(f"{n} tokens" if n > 1 else "1 token" for n in TOKENS)],
        [[name, *(f"{layer[name][str(n)]:.2f}" for n in TOKENS)] for name in layer],
    )
    return {"few": few_table, "many": many_table, "experts": layer_table}


def _few_rows(native: Library) -> tuple[dict[str, dict[str, float]], float]:
    """GB/s of each contender by rows, and of plain reading."""
    contenders = _contenders(native, STREAMED)
    speeds: dict[str, dict[str, float]] = {contender.name: {} for contender in contenders}
    plain = torch.ones(STREAMED // (OUT * HIDDEN), OUT * HIDDEN, dtype=torch.uint8)
    read: list[float] = []
    for m in FEW:
        x = torch.randn(m, HIDDEN)
        times: dict[str, list[float]] = {contender.name: [] for contender in contenders}
        for _ in range(ROUNDS):
            read.append(plain[0].nbytes / 1e9 / median(_seconds(partial(native.read, part)) for part in plain))
            for contender in contenders:
                times[contender.name].append(contender.seconds(x))
        for c in contenders:
            speeds[c.name][str(m)] = c.bytes_each / 1e9 / median(times[c.name])
    return speeds, median(read)


def _many_rows(native: Library) -> dict[str, dict[str, float]]:
    contenders = [c for c in _contenders(native, 8 * OUT * HIDDEN) if c.name not in ("native fp32", "native bf16")]
    speeds: dict[str, dict[str, float]] = {contender.name: {} for contender in contenders}
    for m in MANY:
        x = torch.randn(m, HIDDEN)
        times: dict[str, list[float]] = {contender.name: [] for contender in contenders}
        for _ in range(ROUNDS):
            for contender in contenders:
                times[contender.name].append(contender.seconds(x))
        for c in contenders:
            speeds[c.name][str(m)] = 2 * m * OUT * HIDDEN / 1e9 / median(times[c.name])
    return speeds


def _contenders(native: Library, total_bytes: int) -> list[Contender]:
    """Every kernel, ours and torch's; torch's int8 product is without the quantisation of its inputs."""
    found: list[Contender] = []
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        each = OUT * HIDDEN * dtype.itemsize
        weights = torch.randn(OUT, HIDDEN).to(dtype).repeat(max(total_bytes // each, 2), 1, 1)
        matrices = [dense_matrix(weight) for weight in weights]
        found.append(Contender(f"native {name}", each, len(weights), lambda x, i, m=matrices: native.linear(x, m[i])))
        found.append(
            Contender(f"torch {name}", each, len(weights), lambda x, i, w=weights: F.linear(x.to(w.dtype), w[i]))
        )
    for kind in KINDS:
        shape = PackedShape(kind, OUT, HIDDEN)
        blocks = _random_blocks([shape], max(total_bytes // shape.num_bytes, 2))
        matrices = [packed_matrix(block, shape) for block in blocks]
        found.append(
            Contender(
                f"native {kind}",
                shape.num_bytes,
                len(blocks),
                lambda x, i, m=matrices, b=blocks: native.linear(x, m[i]),
            )
        )
    plain = torch.randint(-127, 128, (OUT, HIDDEN), dtype=torch.int8)
    plain = plain.repeat(max(total_bytes // plain.nbytes, 2), 1, 1)
    found.append(
        Contender(
            "torch _int_mm",
            OUT * HIDDEN,
            len(plain),
            lambda x, i: torch.ops.aten._int_mm(x.to(torch.int8), plain[i].t()),
        )
    )
    return found


def _layers(native: Library) -> dict[str, dict[str, float]]:
    """Milliseconds of one layer's routed experts by the number of tokens, each with its own random choice."""
    tables: dict[str, ExpertTable] = {}
    for kind in KINDS:
        shapes = expert_shapes(kind, HIDDEN, WIDTH)
        tables[f"native {kind}"] = ExpertTable.stacked(_random_blocks(shapes, EXPERTS), shapes)
    passes: dict[str, dict[str, float]] = {name: {} for name in tables}
    for tokens in TOKENS:
        times: dict[str, list[float]] = {name: [] for name in tables}
        for _ in range(ROUNDS * 3 if tokens < 16 else ROUNDS):
            x, weights = torch.randn(tokens, HIDDEN), torch.rand(tokens, TOP_K)
            indices = torch.rand(tokens, EXPERTS).topk(TOP_K).indices.contiguous()
            for name, table in tables.items():
                times[name].append(_seconds(partial(native.experts, table, x, indices, weights)))
        for name in tables:
            passes[name][str(tokens)] = 1e3 * median(times[name])
    return passes


def _random_blocks(shapes: Sequence[PackedShape], count: int) -> Tensor:
    """(count, bytes): matrices one after another, of random codes and a small scale."""
    block = torch.randint(1, 256, (sum(shape.num_bytes for shape in shapes),), dtype=torch.uint8)
    start = 0
    for shape in shapes:
        block[start + shape.scales_at : start + shape.groups_at].view(torch.float32).fill_(1e-3)
        start += shape.num_bytes
    return block.repeat(count, 1)


def _seconds(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun
