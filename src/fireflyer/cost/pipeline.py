"""Pipeline schedules: how long a step takes, how much of it is bubble, what a rank must hold. Arithmetic, no torch.

V3 report, table 2, and the DualPipe project's table for DualPipeV. F, B, W are the times of a chunk's forward, its full
backward and the weights' part of that; F&B is the time of a forward and a backward chunk run over each other.
"""

from __future__ import annotations

from dataclasses import dataclass

SCHEDULES = ("1f1b", "interleaved", "zero-bubble", "dualpipe", "dualpipev")


@dataclass(frozen=True)
class ChunkTimes:
    """Seconds of one chunk, one micro-batch through one stage. `backward` contains `weights`.

    `overlapped` is a forward and a backward chunk together, where the schedule runs them over each other.
    """

    forward: float
    backward: float
    weights: float
    overlapped: float


@dataclass(frozen=True)
class Pipeline:
    """`ranks` devices, each holding `chunks` stages, and `micro_batches` through all of them in a step."""

    schedule: str
    ranks: int
    micro_batches: int
    chunks: int = 1

    @property
    def stages(self) -> int:
        """Pieces that the layers are cut into. DualPipe's two directions share the same ones."""
        return self.ranks * (1 if self.schedule == "dualpipe" else self.chunks)

    @property
    def copies(self) -> int:
        """How many ranks hold each stage: DualPipe keeps two copies of the parameters."""
        return 2 if self.schedule == "dualpipe" else 1

    @property
    def stages_each(self) -> int:
        """Stages that each rank holds."""
        return self.stages * self.copies // self.ranks

    @property
    def overlaps(self) -> bool:
        """Whether a forward and a backward chunk hide each other's communication."""
        return self.schedule in ("dualpipe", "dualpipev")

    def bubble(self, times: ChunkTimes) -> float:
        """Seconds of a step in which a rank waits; for the overlapping schedules the one that is done last."""
        if self.ranks == 1 and not self.overlaps:
            return 0.0
        forward, backward, weights = times.forward, times.backward, times.weights
        if self.schedule == "zero-bubble":
            return (self.ranks - 1) * (forward + backward - 2 * weights)
        if self.overlaps:
            return (self.stages / 2 - 1) * (times.overlapped + backward - 3 * weights)
        return (self.ranks - 1) * (forward + backward)

    def step(self, times: ChunkTimes) -> float:
        """Seconds of all micro-batches, bubble included."""
        alone = times.forward + times.backward
        pairs = self.overlapped_pairs()
        chunks_of_a_rank = self.micro_batches * self.chunks
        if self.schedule == "dualpipe":
            chunks_of_a_rank = self.micro_batches
        return pairs * times.overlapped + (chunks_of_a_rank - pairs) * alone + self.bubble(times)

    def overlapped_pairs(self) -> int:
        """Forward and backward chunks that a middle rank, the last to be done, runs over each other."""
        if not self.overlaps:
            return 0
        chunks = self.micro_batches * (1 if self.schedule == "dualpipe" else 2)
        return chunks - self.stages - 1

    def activations(self, rank: int = 0) -> int:
        """Chunks whose activations a rank holds at once: the first rank most, the DualPipes' ranks all alike."""
        if self.overlaps:
            return self.stages + 1
        chunks = self.micro_batches * self.chunks
        if self.schedule == "interleaved":
            return min(chunks, self.ranks * (self.chunks + 1) - 1 - 2 * rank)
        return min(chunks, self.ranks - rank)


def complaint(pipeline: Pipeline) -> str | None:
    """Why the schedule can't run so, as the end of a sentence that says what would; None: it can."""
    schedule, ranks, micro_batches = pipeline.schedule, pipeline.ranks, pipeline.micro_batches
    if schedule == "dualpipe" and ranks % 2:
        return f"dualpipe needs an even pp, not {ranks}; give {ranks + 1} or dualpipev"
    if schedule == "dualpipe" and micro_batches % 2:
        return f"dualpipe needs an even number of micro-batches, not {micro_batches}"
    if pipeline.overlaps and micro_batches < 2 * ranks:
        return f"{schedule} needs {2 * ranks} micro-batches for {ranks} ranks, and there are {micro_batches}"
    if schedule == "interleaved" and ranks == 1:
        return "interleaved needs pp of 2 or more"
    if schedule == "interleaved" and micro_batches % ranks:
        return f"interleaved needs micro-batches divisible by pp {ranks}, and there are {micro_batches}"
    return None
