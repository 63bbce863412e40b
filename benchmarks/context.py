"""Context extension: a small V3 pretrained on 256 tokens, extended to 1,024 and 4,096 by the report's two phases.

Words hidden in a text that says nothing are asked for at five depths, of three models: the extended one, the one that
it began from, and that one with YaRN's positions and no training. All three answer the same questions.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

from benchmarks._result import ROOT, Proof, Table
from fireflyer.cli.main import main as fireflyer

PRETRAINED, EXTENDED = 256, (1024, 4096)
LENGTHS = (240, *EXTENDED)
"""Of the prompts; the first leaves the pretrained model room for the answer."""
NEEDLES = 20
FOUND, LOST = 0.95, 0.5
PICTURES = {"without extension": "extend-before.svg", "extended": "extend-after.svg"}
_PHASES = [(1024, 4, 50), (4096, 1, 50)]
"""Length, sequences a step, steps: as many tokens a step in both, as the report's."""

Map = list[dict[str, Any]]


def main() -> Proof:
    """Train, extend, ask."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base, extended = _pretrain(folder), folder / "extended"
        _run(["extend", "--from", str(base), "--run", str(extended), *_extension()])
        config = json.loads(_export(extended, folder / "exported").read_text(encoding="utf-8"))
        rope = {key: config[key] for key in ("rope_scaling", "max_position_embeddings")}
        longer = {"max_position_embeddings": config["max_position_embeddings"]}
        models = {
            "without extension": _with(base, folder / "longer", longer),
            "YaRN without training": _with(base, folder / "yarn", rope),
            "extended": extended,
        }
        maps = {name: _ask(model, folder / f"eval-{i}") for i, (name, model) in enumerate(models.items())}
        for name, picture in PICTURES.items():
            shutil.copyfile(folder / f"eval-{list(models).index(name)}" / "needle.svg", ROOT / "docs" / picture)
        figures = {
            "parameters": json.loads(_run(["inspect", str(extended), "--json"]))["parameters"]["total"],
            "maps": maps,
            "found": {name: {str(n): _found(cells, n) for n in LENGTHS} for name, cells in maps.items()},
            "config": rope,
            "train_s": {run.name: _summary(run)["train_s"] for run in (base, extended)},
            "tokens": {run.name: _summary(run)["tokens"] for run in (base, extended)},
        }
    return Proof(figures, {"found": _table(maps)}, missed=_missed(maps, rope))


def _pretrain(folder: Path) -> Path:
    """On short rows, where finding is learnt soonest, then on those of the model's length."""
    recipe = ["--recipe", str(ROOT / "benchmarks" / "context.toml")]
    _run(["pretrain", *recipe, "--run", str(folder / "short")])
    settings = [f"seq_len={PRETRAINED}", "batch_size=16", "steps=200", "schedule.lr=2e-3", "schedule.cosine_lr=2e-4"]
    words = ["--from", str(folder / "short"), "--data", f"builtin:needles-{PRETRAINED}"]
    _run(["pretrain", *recipe, *words, "--run", str(folder / "base"), *_set(settings)])
    return folder / "base"


def _extension() -> list[str]:
    phases = ", ".join(
        f'{{seq_len={length}, batch_size={batch}, steps={steps}, sources=["builtin:needles-{length}"]}}'
        for length, batch, steps in _PHASES
    )
    return _set([f"extend.phases=[{phases}]", "schedule.lr=5e-4", "parallel.recompute=false"])


def _set(settings: Sequence[str]) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


def _ask(model: Path, out: Path) -> Map:
    lengths = ",".join(map(str, LENGTHS))
    words = ["--tasks", "needle", "--lengths", lengths, "--needles", str(NEEDLES), "--out", str(out), "--batch", "8"]
    return json.loads(_run(["eval", str(model), *words, "--json"]))["tasks"]["needle"]["map"]


def _with(run: Path, target: Path, changes: dict[str, Any]) -> Path:
    """The same weights under another config.json."""
    config = _export(run, target)
    config.write_text(json.dumps({**json.loads(config.read_text(encoding="utf-8")), **changes}), encoding="utf-8")
    return target


def _export(run: Path, target: Path) -> Path:
    _run(["export", str(run), str(target)])
    return target / "config.json"


def _summary(run: Path) -> dict[str, Any]:
    return json.loads((run / "summary.json").read_text(encoding="utf-8"))


def _run(words: list[str]) -> str:
    """One command; its output. A refusal ends the proof."""
    said = StringIO()
    with redirect_stdout(said):
        code = fireflyer(words)
    if code:
        raise RuntimeError(f"fireflyer {' '.join(words)}: exit code {code}")
    return said.getvalue()


def _found(cells: Map, length: int) -> list[float]:
    """By depth."""
    return [cell["found"] for cell in cells if cell["length"] == length]


def _table(maps: dict[str, Map]) -> Table:
    depths = sorted({cell["depth"] for cell in maps["extended"]})
    rows = [
        [name, f"{length:,}", *(f"{share:.0%}" for share in _found(cells, length))]
        for name, cells in maps.items()
        for length in LENGTHS
    ]
    return Table(["model", "tokens", *(f"depth {depth:.0%}" for depth in depths)], rows)


def _missed(maps: dict[str, Map], rope: dict[str, Any]) -> list[str]:
    missed = []
    for length in LENGTHS:
        least = min(_found(maps["extended"], length))
        if least < FOUND:
            missed.append(f"extended, {length} tokens: found at every depth in {FOUND:.0%}: {least:.0%} at the worst")
    least = min(_found(maps["without extension"], LENGTHS[0]))
    if least < FOUND:
        missed.append(f"pretrained, {LENGTHS[0]} tokens: found at every depth in {FOUND:.0%}: {least:.0%} at the worst")
    for length in EXTENDED:
        least = min(_found(maps["without extension"], length))
        if least > LOST:
            missed.append(f"without extension, {length} tokens: lost at some depth: {least:.0%} at the worst")
    scaling = rope["rope_scaling"]
    if (scaling["factor"], scaling["original_max_position_embeddings"]) != (40, PRETRAINED):
        missed.append(f"config.json has the YaRN that was trained: {scaling}")
    return missed
