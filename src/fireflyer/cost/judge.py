"""One layout of a training job, judged: memory of the fullest rank, and a step's seconds by its parts. No torch.

In: a Job and a Layout. Out: a TrainingPlan. A pipeline goes at the pace of its slowest rank; what a schedule
doesn't hide of the communication is added to the chunks; gradients are added up and parameters collected after them.
"""

from __future__ import annotations

from dataclasses import dataclass

from fireflyer.cost.flops import training_flops_per_token
from fireflyer.cost.layer_time import BlockTimes, Rank, block_times, head_times, mtp_times
from fireflyer.cost.layouts import Job, Layout
from fireflyer.cost.memory_plan import Memory, RankParameters, Spread, rank_memory, rank_parameters
from fireflyer.cost.parameters import count_parameters
from fireflyer.cost.pipeline import ChunkTimes, Pipeline
from fireflyer.cost.stages import RankLayers, place_layers

_OPTIMIZER_BYTES = 22
"""AdamW reads gradient, master and moments (4 + 4 + 2 + 2) and writes master, moments and weight (4 + 2 + 2 + 2)."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step: `chunks` is all forwards and backwards with their exposed communication."""

    chunks: float
    bubble: float
    gradients: float
    optimizer: float

    @property
    def total(self) -> float:
        return self.chunks + self.bubble + self.gradients + self.optimizer


@dataclass(frozen=True)
class TrainingPlan:
    """One layout judged. `all_to_all_s`: the exchange's seconds of a step on one rank, hidden ones included."""

    layout: Layout
    memory: Memory
    step: StepTime
    times: ChunkTimes
    all_to_all_s: float
    tokens_per_s: float
    mfu: float
    fits: bool


@dataclass(frozen=True)
class _Blocks:
    dense: BlockTimes
    moe: BlockTimes
    tail: BlockTimes
    tail_in_layers: float

    def of(self, rank: RankLayers) -> BlockTimes:
        """All of a rank's stages for one micro-batch."""
        times = self.dense * rank.dense + self.moe * rank.moe
        return times + self.tail if rank.tail else times


class Judge:
    """Memory and time of one job's layouts; what layouts share is worked out once."""

    def __init__(self, job: Job) -> None:
        config = job.config
        self.job = job
        self._counts = count_parameters(config)
        self._num_dense = sum(not config.is_moe(index) for index in range(config.num_hidden_layers))
        self._operations = training_flops_per_token(config, job.seq_len)
        self._blocks: dict[tuple[int, int, int, str, bool], _Blocks] = {}

    def __call__(self, layout: Layout, at_most: float | None = None) -> TrainingPlan | None:
        """The plan of a layout; None: too many stages for the layers, or surely slower than `at_most` seconds."""
        job = self.job
        per_rank = job.global_batch // layout.dp // layout.micro_batch
        pipeline = Pipeline(layout.schedule, layout.pp, per_rank, layout.chunks)
        blocks = self._blocks_of(layout, pipeline.overlaps)
        ranks = place_layers(self._num_dense, job.config.num_hidden_layers, pipeline, blocks.tail_in_layers)
        if ranks is None:
            return None
        loads = [blocks.of(rank) for rank in ranks]
        each = pipeline.stages_each
        times = _slowest([_chunk_times(job, layout, pipeline, load * (1 / each)) for load in loads])
        bubble = pipeline.bubble(times)
        chunks = pipeline.step(times) - bubble
        if at_most is not None and chunks + bubble > at_most:
            return None
        parameters = [rank_parameters(job.config, self._counts, rank, layout.ep) for rank in ranks]
        memory = self._fullest(layout, pipeline, ranks, parameters)
        step = StepTime(
            chunks,
            bubble,
            max(_gradient_seconds(job, layout, *both, per_rank) for both in zip(parameters, loads, strict=True)),
            max(_optimizer_seconds(job, layout, numbers) for numbers in parameters),
        )
        tokens_per_s = job.global_batch * job.seq_len / step.total
        exchanged = max(load.exchange_forward + load.exchange_backward for load in loads)
        return TrainingPlan(
            layout=layout,
            memory=memory,
            step=step,
            times=times,
            all_to_all_s=exchanged * per_rank / pipeline.copies,
            tokens_per_s=tokens_per_s,
            mfu=self._operations * tokens_per_s / (job.count * job.gpu.peak("bf16")),
            fits=memory.total <= job.memory_bytes,
        )

    def _blocks_of(self, layout: Layout, hides: bool) -> _Blocks:
        key = (layout.micro_batch, layout.cp, layout.ep, layout.recompute, hides)
        if key not in self._blocks:
            self._blocks[key] = _blocks(self.job, layout, hides)
        return self._blocks[key]

    def _fullest(
        self, layout: Layout, pipeline: Pipeline, ranks: list[RankLayers], parameters: list[RankParameters]
    ) -> Memory:
        job, memories = self.job, []
        for rank, numbers in zip(ranks, parameters, strict=True):
            spread = Spread(
                precision=job.precision,
                recompute=layout.recompute,
                zero=layout.zero,
                data_ranks=layout.dp * layout.cp,
                ep=layout.ep,
                tokens=layout.micro_batch * job.seq_len // layout.cp,
                stages_each=pipeline.stages_each,
                chunks_held=pipeline.activations(rank.rank),
            )
            memories.append(rank_memory(job.config, rank, numbers, spread))
        return max(memories, key=lambda memory: memory.total)


def _blocks(job: Job, layout: Layout, hides: bool) -> _Blocks:
    config = job.config
    rank = Rank(
        hardware=job.hardware,
        gpu=job.gpu,
        precision=job.precision,
        tokens=layout.micro_batch * job.seq_len // layout.cp,
        seq_len=job.seq_len,
        cp=layout.cp,
        ep=layout.ep,
        recompute=layout.recompute,
        hides_exchange=hides,
    )
    dense = block_times(config, rank, moe=False)
    moe = block_times(config, rank, moe=True) if config.n_routed_experts else dense
    layer = moe if config.is_moe(config.num_hidden_layers - 1) else dense
    tail = head_times(config, rank) + mtp_times(config, rank)
    return _Blocks(dense, moe, tail, (tail.forward + tail.backward) / (layer.forward + layer.backward))


def _chunk_times(job: Job, layout: Layout, pipeline: Pipeline, stage: BlockTimes) -> ChunkTimes:
    """Times of a chunk: what isn't hidden is added. Passing a chunk's hidden states on is hidden where exchange is."""
    passed = 0.0
    if layout.pp > 1:
        within_node = layout.world <= job.gpu.gpus_per_node
        link = job.gpu.nvlink_gb_per_s if within_node else job.gpu.network_gb_per_s
        passed = 2.0 * layout.micro_batch * job.seq_len / layout.cp * job.config.hidden_size / (link * 1e9)
    exchange = stage.exchange_forward + stage.exchange_backward + 2 * passed
    computed = stage.forward + stage.backward
    return ChunkTimes(
        forward=stage.forward + stage.exchange_forward + passed,
        backward=stage.backward + stage.exchange_backward + passed,
        weights=stage.weights,
        overlapped=max(computed, exchange) / job.hardware.kernels.compute_busy if pipeline.overlaps else 0.0,
    )


def _slowest(ranks: list[ChunkTimes]) -> ChunkTimes:
    """A pipeline goes at the pace of its slowest rank, whatever kind of chunk is at work."""
    longest = max(ranks, key=lambda times: times.backward)
    return ChunkTimes(
        forward=max(times.forward for times in ranks),
        backward=longest.backward,
        weights=longest.weights,
        overlapped=max(times.overlapped for times in ranks),
    )


def _gradient_seconds(
    job: Job, layout: Layout, parameters: RankParameters, load: BlockTimes, micro_batches: int
) -> float:
    """Exposed seconds of adding gradients over data ranks and of collecting parameters.

    ZeRO-1 does both once a step. ZeRO-2 adds gradients after each micro-batch, hidden behind its backward as far as
    that lasts; ZeRO-3 also collects the parameters before each forward and backward, hidden likewise.
    """
    data_ranks = layout.dp * layout.cp
    copies = data_ranks // layout.ep
    link = job.gpu.nvlink_gb_per_s if data_ranks <= job.gpu.gpus_per_node else job.gpu.network_gb_per_s
    alike = parameters.dense + parameters.plain
    numbers = alike * (data_ranks - 1) / data_ranks + parameters.experts * (copies - 1) / copies
    reduce, collect = (numbers * size / (link * 1e9) for size in (4, 2))
    if layout.zero == 1:
        return reduce + collect
    exposed = reduce + (micro_batches - 1) * max(0.0, reduce - load.backward)
    if layout.zero == 2:
        return exposed + collect
    return exposed + collect + micro_batches * (max(0.0, collect - load.forward) + max(0.0, collect - load.backward))


def _optimizer_seconds(job: Job, layout: Layout, parameters: RankParameters) -> float:
    data_ranks = layout.dp * layout.cp
    mine = (parameters.dense + parameters.plain) / data_ranks + parameters.experts * layout.ep / data_ranks
    return mine * _OPTIMIZER_BYTES / (job.gpu.memory_gb_per_s * 1e9)
