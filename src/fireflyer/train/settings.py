"""The settings of a training run: frozen, checked tables whose defaults are DeepSeek-V3's where the size allows.

In: plain values (from TOML, see recipe.py). Out: `Recipe`, in which no combination is left that a run could not honour.
Section 4.2 of the V3 report names the figures; `presets/deepseek-v3.toml` is that run. No torch.
"""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, PlainValidator, Strict, model_validator

from fireflyer.config import ModelConfig
from fireflyer.parallel.stages import Schedule
from fireflyer.train.extension import ExtendSettings, LengthPhases
from fireflyer.train.post_training_settings import (
    ADAPTABLE,
    DistillSettings,
    DpoSettings,
    GrpoSettings,
    LoraSettings,
)
from fireflyer.train.quantities import resolve_boundary
from fireflyer.train.ramp import BatchRamp
from fireflyer.train.tables import Beta, Boundary, Fraction01, NotNegative, Positive, SettingError, Table, Tokens

_TORCH_SCHEDULES = {
    "1F1B": "1f1b",
    "Interleaved1F1B": "interleaved",
    "InterleavedZeroBubble": "zero-bubble",
    "DualPipeV": "dualpipev",
}


def _schedule(value: object) -> object:
    return _TORCH_SCHEDULES.get(value, value) if isinstance(value, str) else value


def _device(value: object) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", value):
        raise ValueError("must be 'auto', 'cpu', 'mps', 'cuda' or 'cuda:N'")
    return value


class DataSettings(Table):
    """[data]: what is read: PATH[:WEIGHT] or builtin:NAME[:WEIGHT]. Without `tokenizer` one is trained on it."""

    sources: list[str] = Field(default_factory=list)
    tokenizer: str | None = None
    fim_rate: Fraction01 = 0.0
    mask_documents: bool = False
    held_out: Annotated[float, Field(ge=0, lt=1)] = 0.01
    encoding_errors: Literal["strict", "replace"] = "strict"
    text_column: str = "text"


class OptimizerSettings(Table):
    """[optimizer]: AdamW's figures hold for Muon's AdamW part too. `grad_clip` 0 means no clipping."""

    name: Literal["adamw", "muon"] = "adamw"
    betas: Annotated[tuple[Beta, Beta], Strict(False)] = (0.9, 0.95)
    eps: Positive = 1e-8
    weight_decay: NotNegative = 0.1
    grad_clip: NotNegative = 1.0
    muon_momentum: Beta = 0.95


class FinalPhase(Table):
    """One constant stretch after the cosine: `lr` until `until` tokens."""

    until: Boundary
    lr: NotNegative


class ScheduleSettings(Table):
    """[schedule]: warm-up in steps, then by tokens: constant, cosine, constants; and the batch ramp.

    `warmup_steps` may be a share of the run's steps ("2%"). `cosine_lr` is where the cosine ends (a tenth of `lr` if
    not given). `batch_multiple` is what every batch of the ramp divides by (say, the number of data-parallel ranks).
    """

    lr: Positive = 3e-4
    warmup_steps: Boundary = "2%"
    constant_until: Boundary = "70%"
    cosine_until: Boundary = "100%"
    cosine_lr: NotNegative | None = None
    final: list[FinalPhase] = Field(default_factory=list)
    batch_start: Annotated[int, Field(ge=1)] | None = None
    batch_ramp_tokens: Tokens | None = None
    batch_multiple: Annotated[int, Field(ge=1)] = 1


class BalanceSettings(Table):
    """[balance]: the gate bias moves by `bias_speed` a step until `bias_until`, then stands still."""

    bias_speed: NotNegative = 0.001
    bias_until: Boundary | None = None
    sequence_alpha: NotNegative = 1e-4


class MtpSettings(Table):
    """[mtp]: the weight of the MTP loss, and the one it changes to at `late_from`."""

    weight: NotNegative = 0.3
    late_weight: NotNegative = 0.1
    late_from: Boundary | None = None


class EmaSettings(Table):
    """[ema]: decay of the running mean of the parameters; 0 keeps none."""

    decay: Annotated[float, Field(ge=0, lt=1)] = 0.0


class ParallelSettings(Table):
    """[parallel]: how ranks share the work (see parallel/layout.py), and how each does its part.

    pp stages of layers, each on dp · cp ranks: dp take other sequences (0: all the ranks that are left), cp other parts
    of them; routed experts are spread over ep of these. zero: what they share out beside the work, 1 the optimizer's
    state, 2 gradients too, 3 weights too. micro_batch_size: sequences a forward pass on a rank (0: all at once).
    schedule: in which order a pipeline's ranks work, also by the names of torch's classes; stages: how many each of
    them has (0: 1 with "1f1b", 2 with the others).
    """

    pp: Annotated[int, Field(ge=1)] = 1
    dp: Annotated[int, Field(ge=0)] = 0
    cp: Annotated[int, Field(ge=1)] = 1
    ep: Annotated[int, Field(ge=1)] = 1
    zero: Literal[1, 2, 3] = 1
    schedule: Annotated[Schedule, BeforeValidator(_schedule)] = "1f1b"
    stages: Annotated[int, Field(ge=0)] = 0
    micro_batch_size: Annotated[int, Field(ge=0)] = 0
    recompute: bool = False

    @property
    def ranks(self) -> int:
        """How many these numbers make; those of dp = 0 as one."""
        return self.pp * (self.dp or 1) * self.cp


class PrecisionSettings(Table):
    """[precision]: what is narrower than `dtype`, as in V3's own run (report 3.3); weights and gradients stay fp32.

    matmul: "fp8" takes the matrix products of projections, feed-forwards and experts in e4m3, forward and backward, and
    keeps for the backward what they need in FP8; on a CPU this is emulated. "dtype": all products as `dtype` says.
    moments: AdamW's two. gradient_tile: how many numbers of an activation's gradient share a scale; "128x128" is what
    the report tried and found to diverge, for those who want to see it.
    """

    matmul: Literal["dtype", "fp8"] = "dtype"
    moments: Literal["fp32", "bf16"] = "fp32"
    gradient_tile: Literal["1x128", "128x128"] = "1x128"


class Recipe(Table):
    """Everything that decides a run. Of `steps`, `tokens` and `epochs` the first one given holds."""

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    steps: Tokens | None = None
    tokens: Tokens | None = None
    epochs: Positive | None = None
    batch_size: Annotated[int, Field(ge=1)] = 16
    seq_len: Annotated[int, Field(ge=2)] = 512
    checkpoint_every: Annotated[int, Field(ge=1)] = 100
    keep_checkpoints: Annotated[int, Field(ge=1)] = 2
    eval_every: Annotated[int, Field(ge=0)] = 0
    eval_data: list[str] | None = None
    eval_rows: Annotated[int, Field(ge=1)] = 64
    eval_samples: Annotated[int, Field(ge=0)] = 2
    log_every: Annotated[int, Field(ge=1)] = 1
    device: Annotated[str, PlainValidator(_device)] = "auto"
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    compile: bool = False
    threads: Annotated[int, Field(ge=0)] = 0
    init_from: str | None = None
    model: ModelConfig
    data: DataSettings = DataSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    balance: BalanceSettings = BalanceSettings()
    mtp: MtpSettings = MtpSettings()
    ema: EmaSettings = EmaSettings()
    parallel: ParallelSettings = ParallelSettings()
    precision: PrecisionSettings = PrecisionSettings()
    extend: ExtendSettings | None = None
    lora: LoraSettings | None = None
    dpo: DpoSettings | None = None
    grpo: GrpoSettings | None = None
    distill: DistillSettings | None = None

    @property
    def batch_ramp(self) -> BatchRamp | LengthPhases:
        if self.extend is not None:
            return LengthPhases(self.extend.phases)
        schedule = self.schedule
        return BatchRamp(
            start=self.batch_size if schedule.batch_start is None else schedule.batch_start,
            end=self.batch_size,
            ramp_tokens=schedule.batch_ramp_tokens or 0,
            multiple=schedule.batch_multiple,
            seq_len=self.seq_len,
        )

    @property
    def total_steps(self) -> int | None:
        """Steps of the run; None while its length is in epochs (see recipe.with_epoch_tokens)."""
        if self.steps is not None:
            return self.steps
        return None if self.tokens is None else self.batch_ramp.steps_to(self.tokens)

    @property
    def total_tokens(self) -> int | None:
        """What shares such as "70%" are shares of: `tokens`, or what `steps` come to; None as for `total_steps`."""
        if self.steps is not None:
            return self.batch_ramp.tokens_after(self.steps)
        return self.tokens

    @model_validator(mode="after")
    def _check_together(self) -> Recipe:
        _check_length(self)
        _check_batches(self)
        _check_sequences(self)
        _check_schedule(self)
        _check_lora(self)
        _check_precision(self)
        return self


def _check_length(recipe: Recipe) -> None:
    lengths = {"steps": recipe.steps, "tokens": recipe.tokens, "epochs": recipe.epochs}
    if all(length is None for length in lengths.values()):
        raise SettingError("steps", "the run has no length: set steps, tokens or epochs, as --set steps=1000")
    for key, length in lengths.items():
        if length is not None and length <= 0:
            raise SettingError(key, f"{key} = {length} leaves nothing to train; it must be above 0")


def _check_batches(recipe: Recipe) -> None:
    schedule, micro = recipe.schedule, recipe.parallel.micro_batch_size
    ramp = (schedule.batch_start, schedule.batch_ramp_tokens)
    if (ramp[0] is None) != (ramp[1] is None):
        key = "batch_ramp_tokens" if ramp[0] is None else "batch_start"
        raise SettingError(f"schedule.{key}", "schedule.batch_start and schedule.batch_ramp_tokens go together")
    if schedule.batch_ramp_tokens == 0:
        raise SettingError("schedule.batch_ramp_tokens", "schedule.batch_ramp_tokens = 0: leave it out for no ramp")
    if schedule.batch_start is not None and schedule.batch_start > recipe.batch_size:
        text = f"schedule.batch_start = {schedule.batch_start} is above batch_size = {recipe.batch_size}, where it ends"
        raise SettingError("schedule.batch_start", text)
    sizes = [("batch_size", recipe.batch_size), ("schedule.batch_start", schedule.batch_start)]
    if recipe.extend is not None:
        if schedule.batch_start is not None:
            text = "schedule.batch_start: [extend] has a batch for each phase; leave the ramp out"
            raise SettingError("schedule.batch_start", text)
        sizes = [(f"extend.phases[{i}].batch_size", phase.batch_size) for i, phase in enumerate(recipe.extend.phases)]
    for key, size in sizes:
        for name, unit in (
            ("schedule.batch_multiple", schedule.batch_multiple),
            ("parallel.micro_batch_size", micro),
        ):
            if size is not None and unit and size % unit:
                raise SettingError(name, f"{name} = {unit} does not divide {key} = {size}")
    if schedule.batch_start is not None and micro and schedule.batch_multiple % micro:
        text = f"schedule.batch_multiple = {schedule.batch_multiple} must be a multiple of "
        raise SettingError("schedule.batch_multiple", text + f"parallel.micro_batch_size = {micro}, for the batch ramp")


def _check_sequences(recipe: Recipe) -> None:
    model = recipe.model
    if recipe.seq_len > model.max_position_embeddings:
        limit = model.max_position_embeddings
        text = f"seq_len = {recipe.seq_len} is above model.max_position_embeddings = {limit}; set {limit} at most"
        raise SettingError("seq_len", text)
    if recipe.seq_len <= model.num_nextn_predict_layers:
        text = f"seq_len = {recipe.seq_len} is too short for model.num_nextn_predict_layers = "
        raise SettingError("seq_len", text + str(model.num_nextn_predict_layers))
    if model.quantization_config is not None:
        text = "model.quantization_config: training keeps its weights in fp32; leave it out"
        raise SettingError("model.quantization_config", text)
    if recipe.eval_every and recipe.eval_data is None and recipe.data.held_out == 0:
        text = "eval_every needs held-out text: set data.held_out above 0, or eval_data, or eval_every = 0"
        raise SettingError("eval_every", text)


def _check_lora(recipe: Recipe) -> None:
    if recipe.lora is None:
        return
    for target in recipe.lora.targets:
        if target not in ADAPTABLE:
            text = f"lora.targets has {target!r}; what can be adapted is {', '.join(ADAPTABLE)}"
            raise SettingError("lora.targets", text)
    if not recipe.lora.targets or ("gate_proj" in recipe.lora.targets) != ("up_proj" in recipe.lora.targets):
        text = "lora.targets needs one projection at least, and gate_proj and up_proj together: the two are one matrix"
        raise SettingError("lora.targets", text)
    if recipe.balance.bias_speed:
        text = f"balance.bias_speed = {recipe.balance.bias_speed:g} moves gate biases, which adapters leave as they are"
        raise SettingError("balance.bias_speed", text + "; set it to 0")
    if recipe.ema.decay:
        raise SettingError("ema.decay", f"ema.decay = {recipe.ema.decay:g} isn't kept for adapters; leave it out")


def _check_precision(recipe: Recipe) -> None:
    precision = recipe.precision
    if precision.moments == "bf16" and recipe.optimizer.name != "adamw":
        text = f'precision.moments = "bf16" is AdamW\'s, not for optimizer.name = "{recipe.optimizer.name}"'
        raise SettingError("precision.moments", text + "; leave it out")
    if precision.matmul != "fp8":
        if precision.gradient_tile != "1x128":
            text = f'precision.gradient_tile = "{precision.gradient_tile}" needs precision.matmul = "fp8"'
            raise SettingError("precision.gradient_tile", text)
        return
    # Adapters train beside frozen weights; the others compare two models, or a model with its own rollouts.
    for name, table in (("lora", recipe.lora), ("dpo", recipe.dpo), ("grpo", recipe.grpo)):
        if table is not None:
            text = f'precision.matmul = "fp8" is for pretraining and fine-tuning whole models, not with [{name}]'
            raise SettingError("precision.matmul", text + "; leave it out")
    if recipe.compile:
        text = 'compile = true can\'t be combined with precision.matmul = "fp8"; --set compile=false'
        raise SettingError("compile", text)


def _check_schedule(recipe: Recipe) -> None:
    schedule, steps, total = recipe.schedule, recipe.total_steps, recipe.total_tokens
    if isinstance(schedule.warmup_steps, int) and steps is not None and schedule.warmup_steps >= steps:
        text = f"schedule.warmup_steps = {schedule.warmup_steps} must be below the run's {steps} steps"
        raise SettingError("schedule.warmup_steps", text + ' (a share such as "2%" fits any length)')
    points = [("schedule.constant_until", schedule.constant_until), ("schedule.cosine_until", schedule.cosine_until)]
    points += [(f"schedule.final[{i}].until", phase.until) for i, phase in enumerate(schedule.final)]
    for (key, point), (next_key, next_point) in pairwise(points):
        if total is None and isinstance(point, str) != isinstance(next_point, str):
            continue  # Checked when the data's length is known.
        if resolve_boundary(point, total or 10**12) > resolve_boundary(next_point, total or 10**12):
            raise SettingError(next_key, f"{next_key} = {next_point!r} lies before {key} = {point!r}")
