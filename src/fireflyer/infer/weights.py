"""The model that an engine runs: a CHECKPOINT as it is, packed on the way in, or mapped where it lies packed."""

from __future__ import annotations

from pathlib import Path

import torch

from fireflyer.checkpoint.adapter import adapted, open_adapter
from fireflyer.checkpoint.hf import load_model, load_opened
from fireflyer.checkpoint.packed import load_packed, pack_checkpoint, packed_kind
from fireflyer.checkpoint.published import open_checkpoint
from fireflyer.config.sizes import parse_bytes
from fireflyer.errors import UserError
from fireflyer.infer.stored_weights import load_packed_with_store, load_with_store
from fireflyer.model.decoder import Decoder
from fireflyer.model.packed import KINDS
from fireflyer.numerics.integer import Kind


def load_weights(
    folder: Path,
    dtype: torch.dtype,
    device: torch.device,
    quantization: Kind | None,
    expert_memory: str | int | None = None,
    adapter: str | Path | None = None,
) -> Decoder:
    """The Decoder of a resolved CHECKPOINT. Raises UserError where the arguments don't go together.

    adapter: a low-rank adapter's folder or run, added to the weights as they are read.
    expert_memory: bytes, or a text such as "8GiB", that routed experts may take; the others stay in their files.
    """
    limit = None if expert_memory is None else parse_bytes(expert_memory, "expert_memory")
    if limit is not None and device.type != "cpu":
        raise UserError(f"device is {device}, but expert_memory is for models that run on a CPU; leave it out")
    if quantization not in (None, *KINDS):
        raise UserError(f"quantization is {quantization!r}; it must be one of {', '.join(KINDS)}, or None")
    held = packed_kind(folder)
    if adapter is not None:
        return _with_adapter(folder, dtype, device, quantization or held, limit, adapter)
    if held is None and quantization is None:
        if limit is not None:
            return load_with_store(open_checkpoint(folder), dtype, limit)
        return load_model(folder, dtype=dtype, device=device)
    if held is not None and quantization not in (None, held):
        raise UserError(
            f"{folder}: it holds {held} weights, of which {quantization} ones can't be made; give the checkpoint"
            " that it was converted from"
        )
    if device.type != "cpu":
        raise UserError(f"device is {device}, but {held or quantization} weights run on a CPU; use cpu")
    if dtype != torch.float32:
        raise UserError(f"dtype is {dtype}, but {held or quantization} weights go with float32; leave it out")
    if held is not None:
        return load_packed(folder) if limit is None else load_packed_with_store(folder, limit)
    if limit is not None:
        raise UserError(
            f"expert_memory reads experts as they are needed, which {quantization} weights have to be packed for; type:"
            f" fireflyer convert {folder} DIR --to {quantization}, and run DIR"
        )
    assert quantization is not None
    return pack_checkpoint(open_checkpoint(folder), quantization)


def _with_adapter(
    folder: Path, dtype: torch.dtype, device: torch.device, packed: Kind | None, limit: int | None, adapter: str | Path
) -> Decoder:
    if packed is not None or limit is not None:
        raise UserError(
            f"adapter {adapter}: goes with weights in full; for packed ones or expert_memory, make one model of the two"
            f" first: fireflyer export {adapter} DIR --merge-adapter"
        )
    return load_opened(adapted(open_checkpoint(folder), open_adapter(adapter)), dtype, device)
