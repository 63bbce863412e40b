"""The model that an engine runs: a CHECKPOINT as it is, packed on the way in, or mapped where it lies packed."""

from __future__ import annotations

from pathlib import Path

import torch

from fireflyer.checkpoint.hf import load_model
from fireflyer.checkpoint.packed import load_packed, pack_checkpoint, packed_kind
from fireflyer.checkpoint.published import open_checkpoint
from fireflyer.errors import UserError
from fireflyer.model.decoder import Decoder
from fireflyer.model.packed import KINDS
from fireflyer.numerics.integer import Kind


def load_weights(folder: Path, dtype: torch.dtype, device: torch.device, quantization: Kind | None) -> Decoder:
    """The Decoder of a resolved CHECKPOINT. Raises UserError where the two don't go together."""
    if quantization not in (None, *KINDS):
        raise UserError(f"quantization is {quantization!r}; it must be one of {', '.join(KINDS)}, or None")
    held = packed_kind(folder)
    if held is None and quantization is None:
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
        return load_packed(folder)
    assert quantization is not None
    return pack_checkpoint(open_checkpoint(folder), quantization)
