"""Low-rank adapters as PEFT has them: `adapter_model.safetensors` beside `adapter_config.json`.

In: an adapter's folder, or the run that trained it. Out: a base checkpoint whose tensors come with the adapter added,
W + alpha / rank · B A, row by row as they are read; nothing is written and memory stays within the model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fireflyer.checkpoint.published import ADAPTER_CONFIG, Checkpoint, PublishedTensor
from fireflyer.checkpoint.run import CHECKPOINTS, find_checkpoint
from fireflyer.errors import UserError
from fireflyer.text.tokenizer import Tokenizer

ADAPTER_WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True)
class Adapter:
    """`pairs`: by the published name of the weight, (A, B) in fp32; `base`: the checkpoint it was trained on."""

    folder: Path
    base: str
    scale: float
    pairs: Mapping[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class AdaptedTensor:
    """A published tensor and what an adapter adds to it; rows come in fp32."""

    tensor: PublishedTensor
    a_RK: Tensor
    b_NR: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def path(self) -> Path:
        return self.tensor.path

    def __getitem__(self, rows: slice, /) -> Tensor:
        return self.tensor[rows].float() + self.b_NR[rows] @ self.a_RK


def write_adapter(folder: Path, pairs: Mapping[str, tuple[Tensor, Tensor]], alpha: float, base: str) -> None:
    """Both files, into an existing folder. `pairs`: by the published name of the weight, ending in .weight."""
    tensors: dict[str, Tensor] = {}
    for name, (a, b) in pairs.items():
        stem = _PREFIX + name.removesuffix(".weight")
        tensors[stem + _A], tensors[stem + _B] = a.contiguous().clone(), b.contiguous().clone()
    save_file(tensors, folder / ADAPTER_WEIGHTS)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": next(iter(pairs.values()))[0].shape[0],
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({name.removesuffix(".weight").rpartition(".")[2] for name in pairs}),
    }
    (folder / ADAPTER_CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def open_adapter(path: str | Path) -> Adapter:
    """Of a folder with the two files, or of a run's newest good checkpoint. Raises UserError."""
    folder = Path(path)
    if not (folder / ADAPTER_CONFIG).is_file() and (folder / CHECKPOINTS).is_dir():
        folder = find_checkpoint(folder).path or folder
    if not (folder / ADAPTER_CONFIG).is_file():
        raise UserError(f"{path}: no {ADAPTER_CONFIG} in it; give an adapter's folder, or a run trained with [lora]")
    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / ADAPTER_WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder}: the adapter can't be read ({error}); get both of its files anew") from None
    return Adapter(
        folder, str(config.get("base_model_name_or_path", "")), _scale(config, folder), _pairs(tensors, folder)
    )


def load_adapter_tokenizer(path: str | Path | None) -> Tokenizer | None:
    """The tokenizer that lies beside an adapter, with the mark of a model that was taught; None without one."""
    if path is None:
        return None
    folder = open_adapter(path).folder
    return Tokenizer.from_file(folder) if (folder / "tokenizer.json").is_file() else None


def adapted(checkpoint: Checkpoint, adapter: Adapter) -> Checkpoint:
    """The checkpoint with the adapter added. Raises UserError where the two don't belong together."""
    tensors: dict[str, Any] = dict(checkpoint.tensors)
    for name, (a, b) in adapter.pairs.items():
        if name not in tensors:
            raise UserError(
                f"{adapter.folder}: adapts {name}, which {checkpoint.folder} doesn't have; give its own base"
            )
        if tensors[name].shape != (b.shape[0], a.shape[1]) or a.shape[0] != b.shape[1]:
            raise UserError(
                f"{adapter.folder}: {name} is adapted as ({b.shape[0]}, {a.shape[1]}), but in {checkpoint.folder} it is"
                f" {tensors[name].shape}; give its own base"
            )
        tensors[name] = AdaptedTensor(tensors[name], a, b * adapter.scale)
    return Checkpoint(checkpoint.folder, checkpoint.config, tensors)


def _scale(config: Mapping[str, Any], folder: Path) -> float:
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, (int, float)):
        raise UserError(
            f"{folder / ADAPTER_CONFIG}: r is {rank!r} and lora_alpha {alpha!r}; both must be numbers above 0"
        )
    unsupported = [key for key in ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern") if config.get(key)]
    if unsupported:
        raise UserError(f"{folder / ADAPTER_CONFIG}: has {unsupported[0]}, which isn't read; give plain LoRA")
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _pairs(tensors: Mapping[str, Tensor], folder: Path) -> dict[str, tuple[Tensor, Tensor]]:
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for name, tensor in tensors.items():
        stem = name.removeprefix(_PREFIX).removesuffix(_A).removesuffix(_B)
        other = tensors.get(f"{_PREFIX}{stem}{_B}")
        if not name.endswith((_A, _B)) or f"{_PREFIX}{stem}{_A}" not in tensors or other is None:
            raise UserError(f"{folder / ADAPTER_WEIGHTS}: {name} is no half of a pair lora_A, lora_B; give plain LoRA")
        if name.endswith(_A):
            pairs[f"{stem}.weight"] = (tensor.float(), other.float())
    if not pairs:
        raise UserError(f"{folder / ADAPTER_WEIGHTS}: no pairs of lora_A and lora_B in it; get the file anew")
    return pairs
