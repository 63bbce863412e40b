"""A discrete-event simulation of pipeline schedules: the order of work on each rank, then who waits for whom.

Written from the schedules' descriptions, without the formulas of `fireflyer.cost.pipeline`. Chunks are (direction,
micro-batch, stage); a rank does its list in order, each item as soon as what it needs is there.
"""

from __future__ import annotations

from dataclasses import dataclass

from fireflyer.cost.pipeline import ChunkTimes

Chunk = tuple[int, int, int]
Item = tuple[str, tuple[Chunk, ...]]


@dataclass(frozen=True)
class Run:
    """seconds: the step's. busy: of each rank. held: the most chunks whose activations each rank held."""

    seconds: float
    busy: list[float]
    held: list[int]


def simulate(orders: list[list[Item]], stages: int, times: ChunkTimes) -> Run:
    """Items: F forward, B whole backward, I backward of inputs, W of weights, FB a forward and a backward at once."""
    cost = {
        "F": times.forward,
        "B": times.backward,
        "I": times.backward - times.weights,
        "W": times.weights,
        "FB": times.overlapped,
    }
    done: dict[tuple[str, Chunk], float] = {}
    clock, busy, place = [0.0] * len(orders), [0.0] * len(orders), [0] * len(orders)
    held, most = [0] * len(orders), [0] * len(orders)
    moved = True
    while moved:
        moved = False
        for rank, order in enumerate(orders):
            while place[rank] < len(order):
                kind, chunks = order[place[rank]]
                needs = _needs(kind, chunks, stages)
                if any(need not in done for need in needs):
                    break
                began = max([clock[rank], *(done[need] for need in needs)])
                clock[rank] = began + cost[kind]
                busy[rank] += cost[kind]
                for letter, chunk in zip("FB" if kind == "FB" else kind.replace("I", "B"), chunks, strict=True):
                    if letter != "W":
                        done[letter, chunk] = clock[rank]
                    held[rank] += {"F": 1, "B": -1, "W": 0}[letter] if kind != "FB" else 0
                most[rank] = max(most[rank], held[rank] + (kind == "FB"))
                place[rank] += 1
                moved = True
    assert all(place[rank] == len(order) for rank, order in enumerate(orders)), "the schedule waits for itself"
    return Run(max(clock), busy, most)


def _needs(kind: str, chunks: tuple[Chunk, ...], stages: int) -> list[tuple[str, Chunk]]:
    needs = []
    for letter, (direction, batch, stage) in zip("FB" if kind == "FB" else kind, chunks, strict=True):
        if letter == "F" and stage > 0:
            needs.append(("F", (direction, batch, stage - 1)))
        if letter in "BI":
            needs.append(("F", (direction, batch, stage)))
            if stage < stages - 1:
                needs.append(("B", (direction, batch, stage + 1)))
    return needs


def one_f_one_b(ranks: int, micro_batches: int) -> list[list[Item]]:
    orders = []
    for rank in range(ranks):
        warm = min(ranks - 1 - rank, micro_batches)
        order: list[Item] = [("F", ((0, i, rank),)) for i in range(warm)]
        for i in range(micro_batches - warm):
            order += [("F", ((0, warm + i, rank),)), ("B", ((0, i, rank),))]
        order += [("B", ((0, i, rank),)) for i in range(micro_batches - warm, micro_batches)]
        orders.append(order)
    return orders


def zero_bubble(ranks: int, micro_batches: int) -> list[list[Item]]:
    """ZB-H1: 1F1B whose weight gradients wait: rank r puts off r of them until its gradients have left."""
    orders = []
    for rank in range(ranks):
        warm = min(ranks - 1 - rank, micro_batches)
        order: list[Item] = [("F", ((0, i, rank),)) for i in range(warm)]
        weights = 0
        for i in range(micro_batches):
            if warm + i < micro_batches:
                order.append(("F", ((0, warm + i, rank),)))
            order.append(("I", ((0, i, rank),)))
            if i >= rank:
                order.append(("W", ((0, weights, rank),)))
                weights += 1
        order += [("W", ((0, i, rank),)) for i in range(weights, micro_batches)]
        orders.append(order)
    return orders


def interleaved(ranks: int, micro_batches: int, chunks: int) -> list[list[Item]]:
    """Megatron's order: groups of `ranks` micro-batches go through the chunks in turn."""
    total = micro_batches * chunks

    def chunk_at(place: int, rank: int, backward: bool) -> Chunk:
        group, within = divmod(place, ranks * chunks)
        chunk, batch = divmod(within, ranks)
        chunk = chunks - 1 - chunk if backward else chunk
        return 0, group * ranks + batch, chunk * ranks + rank

    orders = []
    for rank in range(ranks):
        warm = min(2 * (ranks - 1 - rank) + (chunks - 1) * ranks, total)
        order: list[Item] = [("F", (chunk_at(i, rank, False),)) for i in range(warm)]
        for i in range(total - warm):
            order += [("F", (chunk_at(warm + i, rank, False),)), ("B", (chunk_at(i, rank, True),))]
        order += [("B", (chunk_at(i, rank, True),)) for i in range(total - warm, total)]
        orders.append(order)
    return orders


def dualpipe(ranks: int, micro_batches: int) -> list[list[Item]]:
    """Two directions at once, as the DualPipe project's step describes: eight phases a rank."""
    half, rounds = ranks // 2, micro_batches // 2
    orders = []
    for rank in range(ranks):
        near = min(rank, ranks - 1 - rank)
        first_half = rank < half
        stage = {0: rank, 1: ranks - 1 - rank}

        def chunk(phase: int, batch: int, first_half=first_half, stage=stage) -> Chunk:
            direction = phase if first_half else 1 - phase
            return direction, batch, stage[direction]

        orders.append(_both_ways(half, near, rounds, ranks, chunk))
    return orders


def dualpipev(ranks: int, micro_batches: int) -> list[list[Item]]:
    """DualPipe cut in half: a rank has stages r and 2 ranks - 1 - r of one direction."""
    orders = []
    for rank in range(ranks):

        def chunk(phase: int, batch: int, rank=rank) -> Chunk:
            return 0, batch, rank if phase == 0 else 2 * ranks - 1 - rank

        orders.append(_both_ways(ranks, rank, micro_batches, 2 * ranks, chunk))
    return orders


def _both_ways(half: int, near: int, rounds: int, stages: int, chunk) -> list[Item]:
    order: list[Item] = []
    forwards, backwards = [0, 0], [0, 0]
    waiting: list[Chunk] = []

    def forward(phase: int) -> Chunk:
        forwards[phase] += 1
        return chunk(phase, forwards[phase] - 1)

    def backward(phase: int) -> Chunk:
        backwards[phase] += 1
        return chunk(phase, backwards[phase] - 1)

    def alone(phase: int, zero_bubble: bool) -> None:
        item = backward(phase)
        order.append(("I" if zero_bubble else "B", (item,)))
        if zero_bubble:
            waiting.append(item)

    order += [("F", (forward(0),)) for _ in range(2 * (half - near - 1))]
    for _ in range(near + 1):
        order += [("F", (forward(0),)), ("F", (forward(1),))]
    for _ in range(half - near - 1):
        alone(1, True)
        order.append(("W", (waiting.pop(0),)))
        order.append(("F", (forward(1),)))
    for i in range(rounds - stages + near + 1):
        if i == 0 and near == half - 1:
            order += [("F", (forward(0),)), ("B", (backward(1),))]
        else:
            order.append(("FB", (forward(0), backward(1))))
        order.append(("FB", (forward(1), backward(0))))
    for _ in range(half - near - 1):
        alone(1, False)
        order.append(("FB", (forward(1), backward(0))))
    later = False
    for i in range(near + 1):
        later = later or (i == (near + 1) // 2 and near % 2 == 1)
        alone(1, later)
        later = later or (i == (near + 1) // 2 and near % 2 == 0)
        alone(0, later)
    for _ in range(half - near - 1):
        order.append(("W", (waiting.pop(0),)))
        alone(0, True)
    order += [("W", (item,)) for item in waiting]
    return order
