"""Every setting of the recipe that concerns training changes the run: none is read and forgotten."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_run import checkpoint_bytes, tiny_recipe, write_text

from fireflyer.checkpoint.run import newest_good_checkpoint
from fireflyer.train.extension import ExtendSettings
from fireflyer.train.loop import train
from fireflyer.train.post_training_settings import DistillSettings, GrpoSettings
from fireflyer.train.recipe import known_keys

STEPS = 4
CHANGED = {
    "seed": 1,
    "steps": 5,
    "batch_size": 6,
    "seq_len": 20,
    "dtype": "bf16",
    "data.fim_rate": 0.9,
    "data.mask_documents": True,
    "data.held_out": 0.5,
    "optimizer.name": "muon",
    "optimizer.betas": [0.8, 0.95],
    "optimizer.eps": 1e-3,
    "optimizer.weight_decay": 0.5,
    "optimizer.grad_clip": 0.01,
    "schedule.lr": 1e-4,
    "schedule.warmup_steps": 3,
    "schedule.constant_until": "10%",
    "schedule.cosine_until": "70%",
    "schedule.cosine_lr": 1e-3,
    "balance.bias_speed": 0.1,
    "balance.bias_until": "30%",
    "balance.sequence_alpha": 1.0,
    "mtp.weight": 1.0,
    "mtp.late_weight": 1.0,
    "mtp.late_from": "10%",
    "precision.matmul": "fp8",
    "precision.moments": "bf16",
    "model.initializer_range": 0.1,
}
OTHERWISE_TESTED = {
    "how long, how often and where": {"tokens", "epochs", "checkpoint_every", "keep_checkpoints", "eval_every"}
    | {"eval_data", "eval_rows", "eval_samples", "log_every", "device", "compile", "threads", "init_from"},
    "what is read": {"data.sources", "data.tokenizer", "data.encoding_errors", "data.text_column"},
    "no effect on the weights": {"ema.decay", "parallel.micro_batch_size", "parallel.recompute"}
    | {f"parallel.{name}" for name in ("pp", "dp", "cp", "ep", "zero", "schedule", "stages")},
    "context extension": {"extend"} | {f"extend.{name}" for name in ExtendSettings.model_fields},
    "post-training": {"lora.rank", "lora.alpha", "lora.targets", "lora.experts"}
    | {"dpo.beta", "dpo.label_smoothing", "dpo.normalize_length"}
    | {f"grpo.{name}" for name in GrpoSettings.model_fields}
    | {f"distill.{name}" for name in DistillSettings.model_fields},
    "only with others": {"optimizer.muon_momentum", "precision.gradient_tile", "schedule.final", "schedule.batch_start"}
    | {"schedule.batch_ramp_tokens", "schedule.batch_multiple"},
}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("data") / "text.jsonl", 200)


def weights(run_dir: Path, text: Path, **settings) -> bytes:
    train(
        tiny_recipe(text, **{"steps": STEPS, "checkpoint_every": 100, "schedule__cosine_lr": 0.0, **settings}), run_dir
    )
    path = newest_good_checkpoint(run_dir)
    assert path is not None
    return checkpoint_bytes(path)["model.safetensors"]


@pytest.fixture(scope="module")
def base(text: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return weights(tmp_path_factory.mktemp("base") / "run", text)


@pytest.mark.parametrize("key", CHANGED)
def test_it_changes_the_weights(key: str, base: bytes, text: Path, tmp_path: Path):
    assert weights(tmp_path / "run", text, **{key.replace(".", "__"): CHANGED[key]}) != base


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"optimizer__name": "muon"}, {"optimizer__name": "muon", "optimizer__muon_momentum": 0.5}),
        ({"precision__matmul": "fp8"}, {"precision__matmul": "fp8", "precision__gradient_tile": "128x128"}),
        (
            {"schedule__batch_start": 2, "schedule__batch_ramp_tokens": 300, "schedule__batch_multiple": 1},
            {"schedule__batch_start": 2, "schedule__batch_ramp_tokens": 300, "schedule__batch_multiple": 2},
        ),
        (
            {"schedule__batch_start": 1, "schedule__batch_ramp_tokens": 400},
            {"schedule__batch_start": 1, "schedule__batch_ramp_tokens": 150},
        ),
    ],
)
def test_settings_that_need_others(first: dict, second: dict, text: Path, tmp_path: Path):
    assert weights(tmp_path / "a", text, **first) != weights(tmp_path / "b", text, **second)


def test_every_key_is_here():
    """A new key has to be put into one of the lists above."""
    listed = CHANGED.keys() | set().union(*OTHERWISE_TESTED.values())
    keys = {key for key in known_keys() if not key.startswith("model.") and key not in ("model", *_TABLES)}
    assert keys - listed == set()


_TABLES = (
    "data",
    "optimizer",
    "schedule",
    "balance",
    "mtp",
    "ema",
    "parallel",
    "precision",
    "lora",
    "dpo",
    "grpo",
    "distill",
)
