"""`fireflyer inspect CONFIG --fit`: what a model takes of this machine's memory, and what to do if it is too much."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fireflyer.config.sizes import show_bytes

if TYPE_CHECKING:
    from fireflyer.config import ModelConfig
    from fireflyer.evaluate.fit import Fit
    from fireflyer.evaluate.machine import Machine

_USUAL_DISK = 2e9
"""Bytes a second where no file was there to measure with: a common NVMe disk."""
_FILES_ALONE = ("bf16", "fp8")
"""What no verb runs as it is: both are read as fp32, unless packed."""


def examine(name: str, config: ModelConfig, context: int, batch: int) -> tuple[dict[str, Any], str]:
    """The facts under the names of --json, and the same for people."""
    import fireflyer.infer.llm  # noqa: F401  (what answers must be loaded, or the process would weigh less)
    from fireflyer.evaluate.fit import PRECISIONS, fit
    from fireflyer.evaluate.machine import measure_machine

    path = Path(name)
    machine = measure_machine(path if path.exists() else Path.cwd())
    own = (config.quantization_config or {}).get("weights") if config.is_packed else None
    fits = [fit(config, precision, context, batch, machine) for precision in PRECISIONS if own in (None, precision)]
    advice = _advice(name, config, fits, machine)
    facts = {
        "context": context,
        "batch": batch,
        "machine": asdict(machine),
        "precisions": {each.precision: _facts(each, machine) for each in fits},
        "advice": advice,
    }
    return facts, "\n".join([*_machine_lines(machine), "", *_table(fits, context, batch), "", *advice])


def _facts(fitted: Fit, machine: Machine) -> dict[str, Any]:
    weights = fitted.weights
    return {
        "weights_bytes": weights.total,
        "expert_bytes": weights.experts,
        "cache_bytes": fitted.cache,
        "activation_bytes": fitted.activations,
        "process_bytes": fitted.process,
        "total_bytes": fitted.total,
        "disk_bytes": weights.disk,
        "fits": fitted.fits,
        "fits_disk": fitted.fits_disk,
        "fits_gpu": None if machine.gpu_free is None or not _runs_on_gpu(fitted) else _on_gpu(fitted, machine),
        "decode_tokens_per_s": fitted.decode_tokens_per_s,
    }


def _runs_on_gpu(fitted: Fit) -> bool:
    return fitted.precision in ("fp32", "bf16")


def _on_gpu(fitted: Fit, machine: Machine) -> bool:
    return fitted.total - fitted.process <= (machine.gpu_free or 0)


def _machine_lines(machine: Machine) -> list[str]:
    disk = machine.disk_bytes_per_s
    gpu = f"{machine.gpu} with {show_bytes(machine.gpu_free or 0)} free" if machine.gpu else "no GPU"
    return [
        f"this machine: {show_bytes(machine.memory_free)} of {show_bytes(machine.memory_total)} memory free, read at"
        f" {machine.read_bytes_per_s / 1e9:.1f} GB/s; {show_bytes(machine.disk_free)} of disk free"
        f"{'' if disk is None else f', read at {disk / 1e9:.1f} GB/s'}; {gpu}"
    ]


def _table(fits: list[Fit], context: int, batch: int) -> list[str]:
    sequences = "1 sequence" if batch == 1 else f"{batch} sequences"
    lines = [
        f"{sequences} of {context:,} tokens, answered on the CPU:",
        f"{'':6}{'weights':>12}{'cache':>12}{'activations':>13}{'in memory':>12}  {'fits':<16}{'tokens/s':>9}"
        f"{'on disk':>12}",
    ]
    for each in fits:
        memory = each.weights.total, each.cache, each.activations, each.total
        weights, cache, activations, total = map(show_bytes, memory)
        lacking = each.total - each.free - each.process
        verdict = "yes" if each.fits else f"{show_bytes(lacking)} short"
        rate = each.decode_tokens_per_s
        lines.append(
            f"{each.precision:<6}{weights:>12}{cache:>12}{activations:>13}{total:>12}  {verdict:<16}"
            f"{f'{rate:,.0f}' if rate >= 10 else f'{rate:.2g}':>9}{show_bytes(each.weights.disk):>12}"
        )
    notes = [
        f"in memory: with {show_bytes(fits[0].process)} for Python and torch; tokens/s: what reading all that allows",
    ]
    if len(fits) > 1:
        notes.append("fp8 is a form of files: in memory it is bf16. On a CPU the verbs run fp32, int8 and int4")
    return [*lines, *notes]


def _advice(name: str, config: ModelConfig, fits: list[Fit], machine: Machine) -> list[str]:
    """What to type, the least change first."""
    runs = [each for each in fits if each.precision not in _FILES_ALONE]
    plain, packed = runs[0], runs[1:]
    checkpoint = name if os.path.exists(name) and not name.endswith((".toml", ".json")) else "CHECKPOINT"
    lines = [f"It fits: fireflyer generate {checkpoint} PROMPT"] if plain.fits else []
    for each in packed:
        if each.fits and (not plain.fits or each is packed[0]):
            what = "Faster, from fewer bytes" if plain.fits else f"It fits as {each.precision}"
            lines.append(f"{what}: {_convert(checkpoint, each)}")
            if not plain.fits:
                break
    if not any(each.fits for each in runs):
        lines += _when_nothing_fits(checkpoint, config, runs, machine)
    gpu = [each for each in fits if _runs_on_gpu(each) and machine.gpu and _on_gpu(each, machine)]
    if gpu:
        lines.append(f"On {machine.gpu} it fits as {gpu[0].precision}: fireflyer generate {checkpoint} --device cuda")
    return lines or ["It doesn't fit, whatever is done: it needs a larger machine; see fireflyer plan"]


def _convert(checkpoint: str, fitted: Fit) -> str:
    """The line that makes a packed folder, and what to do where the disk is too small for one."""
    kind = fitted.precision
    target = f"{Path(checkpoint).name.removesuffix('.gguf')}-{kind}"
    if not fitted.fits_disk:
        short = show_bytes(fitted.weights.disk - fitted.disk_free)
        return (
            f"fireflyer generate {checkpoint} PROMPT --quantization {kind} (no folder of it: the disk is {short} short)"
        )
    return f"fireflyer convert {checkpoint} {target} --to {kind}, then fireflyer generate {target} PROMPT"


def _when_nothing_fits(checkpoint: str, config: ModelConfig, runs: list[Fit], machine: Machine) -> list[str]:
    from fireflyer.evaluate.fit import bounded, longest_context

    lines = []
    smallest = runs[-1]
    if context := longest_context(config, smallest, machine):
        line = _convert(checkpoint, smallest) if len(runs) > 1 else f"fireflyer generate {checkpoint} PROMPT"
        lines.append(f"It fits as {smallest.precision} with up to {context:,} tokens: {line}")
    disk = machine.disk_bytes_per_s or _USUAL_DISK
    possible = [(bounded(config, each, disk), each) for each in runs if each is runs[0] or each.fits_disk]
    found = [(limit, each) for limit, each in possible if limit is not None]
    if found:
        limit, each = max(found, key=lambda pair: pair[0].decode_tokens_per_s)
        how = "" if each is runs[0] else f"fireflyer convert {checkpoint} DIR --to {each.precision}, then "
        where = checkpoint if each is runs[0] else "DIR"
        supposed = "" if machine.disk_bytes_per_s else ", if the disk gives 2 GB/s"
        lines.append(
            f"With {limit.share_resident:.0%} of its experts in memory, {limit.decode_tokens_per_s:.2g} tokens/s or"
            f" more{supposed}: {how}fireflyer generate {where} PROMPT --expert-memory {limit.limit // 2**20}MiB"
        )
    elif bounded(config, smallest, disk):
        short = show_bytes(smallest.weights.disk - smallest.disk_free)
        lines.append(
            f"With --expert-memory it would run as {smallest.precision}, but the disk is {short} short of that"
        )
    return lines
