"""What a conversion would read and write, from headers or from names alone: `fireflyer convert ... --dry-run`."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fireflyer.cli.configs import find_model
from fireflyer.errors import UserError

if TYPE_CHECKING:
    from fireflyer.checkpoint.conversion_plan import Precision
    from fireflyer.checkpoint.listing import Share
    from fireflyer.checkpoint.published import Checkpoint
    from fireflyer.checkpoint.safetensors_file import TensorRows


def dry_run(name: str, folder: str, to: Precision) -> dict[str, Any]:
    """What goes in and what comes out, in tensors, numbers and bytes by dtype; and the room at DIR."""
    from fireflyer.checkpoint.conversion_plan import plan_conversion
    from fireflyer.checkpoint.listing import count, num_bytes

    checkpoint, stored, ignored, by_name = _open(name, Path(folder), to)
    plan = plan_conversion(checkpoint.config, checkpoint.tensors, to, checkpoint.config.to_dict())
    read = count((tensor.dtype, tuple(tensor.shape)) for tensor in stored.values())
    written = count(plan.outputs.values())
    place = Path(folder).absolute()
    while not place.is_dir():
        place = place.parent
    return {
        "to": to,
        "from_names_alone": by_name,
        "source": {**_total(read, len(ignored)), "ignored": len(ignored)},
        "destination": {**_total(written), "files": len(plan.files), "file_bytes": plan.num_bytes},
        "largest_tensor_bytes": max(num_bytes(tensor.dtype, tensor.shape) for tensor in stored.values()),
        "free_bytes": shutil.disk_usage(place).free,
    }


def _total(shares: dict[str, Share], ignored: int = 0) -> dict[str, Any]:
    return {
        "tensors": sum(share.tensors for share in shares.values()) + ignored,
        "numbers": sum(share.numbers for share in shares.values()),
        "bytes": sum(share.bytes for share in shares.values()),
        "by_dtype": {dtype: asdict(share) for dtype, share in shares.items()},
    }


def table(name: str, facts: dict[str, Any]) -> str:
    """The same for people."""
    source, destination = facts["source"], facts["destination"]
    lines = [
        f"{name} to {facts['to']}" + (", counted from names alone" if facts["from_names_alone"] else ""),
        "",
        f"{'':<18}{'tensors':>10}{'numbers':>20}{'bytes':>22}",
        *_rows("read", source),
        *([f"{'  passed over':<18}{source['ignored']:>10,}  rotary frequencies"] if source["ignored"] else []),
        *_rows("written", destination),
        "",
    ]
    files = f"{destination['files']:,} file" + ("s" if destination["files"] != 1 else "")
    lines.append(f"{files}, {_size(destination['file_bytes'])}; free there: {_size(facts['free_bytes'])}")
    lines.append(f"largest tensor: {_size(facts['largest_tensor_bytes'])}, which bounds the memory needed")
    return "\n".join(lines)


def _rows(what: str, side: dict[str, Any]) -> list[str]:
    rows = [(what, side), *((f"  {dtype}", share) for dtype, share in side["by_dtype"].items())]
    return [f"{label:<18}{row['tensors']:>10,}{row['numbers']:>20,}{row['bytes']:>22,}" for label, row in rows]


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:,.2f} GB"


def _open(name: str, folder: Path, to: Precision) -> tuple[Checkpoint, Mapping[str, TensorRows], list[str], bool]:
    """(checkpoint, its tensors as stored, names passed over, whether names were all there was)."""
    from fireflyer.checkpoint.gguf import is_gguf
    from fireflyer.checkpoint.listing import list_by_name, names_in_index, stored_tensors

    path = Path(name)
    names = names_in_index(path) if path.is_dir() else None
    if names is not None or not (path.is_dir() or (path.is_file() and is_gguf(path))):
        config = find_model(name)
        if config.is_packed:
            raise UserError(f"{name}: its weights are packed already; give the checkpoint that they were made from")
        return *list_by_name(config, path, names), True
    from fireflyer.checkpoint.convert import prepare

    checkpoint = prepare(path, folder, to).checkpoint  # the destination is looked at too
    if is_gguf(checkpoint.folder):
        return checkpoint, checkpoint.tensors, [], False
    return checkpoint, *stored_tensors(checkpoint.folder, checkpoint.config), False
