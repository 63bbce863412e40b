"""The tables of post-training: adapters, preferences, reinforcement learning, distillation. Read with settings.py's."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from fireflyer.train.tables import NotNegative, Positive, Table

ADAPTABLE = (
    "q_proj",
    "q_a_proj",
    "q_b_proj",
    "kv_a_proj_with_mqa",
    "kv_b_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
)
"""Projections that can have an adapter, by their published names."""

LengthRule = Literal["answer", "token", "constant"]
Judge = Literal["auto", "exact", "number", "math", "code"]


class ProblemSettings(Table):
    """What [grpo] and [distill] share: problems, how they are put, and limits of answering and grading them.

    environment: a reasoning-gym name, with `options` as KEY=VALUE of its data set; a JSONL file; or a Python file.
    judge: how a JSONL file's answers are compared; "auto" looks at them.
    prompt, system: "chat" asks in the checkpoint's chat template, "raw" puts the problem as it stands.
    max_answer_tokens: where an answer is cut off; answers_at_once: how many are written at the same time.
    held_out: problems kept for evaluation. grade_timeout_s, grade_memory_mib: limits of grading one answer.
    """

    table: ClassVar[str]
    """Its name in a recipe."""

    environment: str = ""
    options: list[str] = Field(default_factory=list)
    judge: Judge = "auto"
    prompt: Literal["chat", "raw"] = "chat"
    system: str | None = None
    max_answer_tokens: Annotated[int, Field(ge=1)] = 256
    answers_at_once: Annotated[int, Field(ge=1)] = 128
    held_out: Annotated[int, Field(ge=0)] = 64
    grade_timeout_s: Positive = 10.0
    grade_memory_mib: Annotated[int, Field(ge=64)] = 1024


class GrpoSettings(ProblemSettings):
    """[grpo]: problems, rewards, and the objective (report 5.2.2) with its named corrections.

    group_size: answers to each problem; updates: optimizer steps for each set of rollouts.
    answer_weight, format_weight: of the grader's reward, and of 1 for the form thought, answer, end.
    normalize_std false and length_rule "constant" are Dr. GRPO's; length_rule "token" and a clip_high above clip_low
    DAPO's. kl_weight: β, towards the checkpoint that the run began from; 0 needs no reference model.
    mask_truncated: answers that were cut off only count within their group. routing_replay: an update takes the experts
    that its rollouts took.
    """

    table: ClassVar[str] = "grpo"

    group_size: Annotated[int, Field(ge=2)] = 16
    updates: Annotated[int, Field(ge=1)] = 1
    answer_weight: NotNegative = 1.0
    format_weight: NotNegative = 0.1
    normalize_std: bool = True
    length_rule: LengthRule = "answer"
    clip_low: Annotated[float, Field(gt=0, lt=1)] = 0.2
    clip_high: Positive = 0.2
    kl_weight: NotNegative = 0.001
    mask_truncated: bool = False
    routing_replay: bool = False


class DistillSettings(ProblemSettings):
    """[distill]: which of a teacher's answers a student learns (R1, 2.3.3 and 2.4: rejection sampling, then SFT).

    teacher: its checkpoint. problems: how many are asked; a file that has fewer is asked whole.
    samples: answers to each, drawn at `temperature` and `top_p`; keep: how many of them are learnt at most.
    min_reward: the least reward of an answer to be kept; None: the environment says what is right.
    """

    table: ClassVar[str] = "distill"

    teacher: str = ""
    problems: Annotated[int, Field(ge=1)] = 1000
    samples: Annotated[int, Field(ge=1)] = 4
    keep: Annotated[int, Field(ge=1)] = 1
    temperature: NotNegative = 0.6
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.95
    min_reward: Annotated[float, Field(allow_inf_nan=False)] | None = None


class LoraSettings(Table):
    """[lora]: train low-rank adapters beside frozen weights: W + alpha / rank · B A.

    targets: projections by their published names. experts: whether the routed experts' are among them.
    """

    rank: Annotated[int, Field(ge=1)] = 16
    alpha: Positive = 32.0
    targets: list[str] = Field(default_factory=lambda: list(ADAPTABLE))
    experts: bool = True


class DpoSettings(Table):
    """[dpo]: β, the share of pairs taken to be the wrong way round, and whether an answer counts by its mean token."""

    beta: Positive = 0.1
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    normalize_length: bool = False
