"""`ember` on the standard library: does held-out text get cheaper, and does the model write Python that holds together?

Completions of held-out code are cut at their last whole line and compiled with what came before, against two controls:
the same number of tokens drawn from the training text's own frequencies, and the same model before training.
"""

from __future__ import annotations

import ast
import codeop
import json
import random
import tempfile
import warnings
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from benchmarks._result import Proof, Table
from fireflyer.cli.main import main as fireflyer
from fireflyer.data.mixture import open_sources
from fireflyer.infer.llm import LLM
from fireflyer.infer.sampling_params import SamplingParams
from fireflyer.model.decoder import init_weights_
from fireflyer.text.tokenizer import Tokenizer

PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 200, 120, 64


def main() -> Proof:
    """One run of the shipped recipe with its shipped settings."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "ember"
        code = fireflyer(["pretrain", "--recipe", "ember", "--data", "builtin:stdlib", "--run", str(run_dir)])
        if code:
            raise RuntimeError(f"pretrain ended with {code}")
        rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
        valid = _valid_shares(run_dir)
    curve = [row for row in rows if "bits_per_byte" in row]
    figures = {
        "summary": {key: value for key, value in summary.items() if key != "checkpoint"},
        "curve": [{key: row[key] for key in ("step", "tokens", "eval_loss", "bits_per_byte")} for row in curve],
        "valid_python": valid,
    }
    missed = []
    if any(later["bits_per_byte"] > sooner["bits_per_byte"] for sooner, later in pairwise(curve)):
        missed.append("bits per byte falls at every evaluation")
    if valid["trained"] <= max(valid["token_frequencies"], valid["before_training"]):
        missed.append("completions compile more often than chance")
    columns = ["step", "tokens", "held-out loss", "bits per byte"]
    shown = [[r["step"], f"{r['tokens']:,}", f"{r['eval_loss']:.3f}", f"{r['bits_per_byte']:.3f}"] for r in curve]
    controls = [[name.replace("_", " "), f"{share:.0%}"] for name, share in valid.items()]
    tables = {"curve": Table(columns, shown), "valid": Table(["tokens from", "completions that compile"], controls)}
    return Proof(figures, tables, missed=missed)


def _valid_shares(run_dir: Path) -> dict[str, float]:
    llm = LLM(run_dir)
    tokenizer = Tokenizer.from_file(run_dir)
    prompts = _prompts(tokenizer)
    frequencies = _training_tokens(tokenizer)
    shares = {"trained": _share(prompts, _complete(llm, prompts))}
    draw = random.Random(0)
    drawn = [tokenizer.decode(draw.choices(frequencies, k=NEW_TOKENS)) for _ in prompts]
    shares["token_frequencies"] = _share(prompts, drawn)
    init_weights_(llm.model, torch.Generator().manual_seed(0))
    shares["before_training"] = _share(prompts, _complete(llm, prompts))
    return shares


def _complete(llm: LLM, prompts: Sequence[str]) -> list[str]:
    outputs = llm.generate(list(prompts), SamplingParams(max_tokens=NEW_TOKENS, temperature=0.7, seed=1))
    return [output.outputs[0].text for output in outputs]


def _share(prompts: Sequence[str], completions: Sequence[str]) -> float:
    return sum(_holds(p, c) for p, c in zip(prompts, completions, strict=True)) / len(prompts)


def _holds(prompt: str, completion: str) -> bool:
    """Whether the completion has a whole line with something on it, and no line of it breaks the syntax."""
    whole_lines = completion[: completion.rfind("\n") + 1]
    return bool(whole_lines.strip()) and _compiles(prompt + whole_lines)


def _compiles(code: str) -> bool:
    """A program, or the beginning of one."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            codeop.compile_command(code, symbol="exec")
    except (SyntaxError, ValueError, OverflowError):
        return False
    return True


def _held_out() -> list[str]:
    source = open_sources(["builtin:stdlib"]).sources[0]
    return ["".join(part.text for part in parts) for parts in source.held_out_documents()]


def _prompts(tokenizer: Tokenizer) -> list[str]:
    """Beginnings of held-out top-level definitions, cut after a whole line."""
    prompts = []
    for text in _held_out():
        lines = text.splitlines(keepends=True)
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.end_lineno:
                definition = lines[node.lineno - 1 : node.end_lineno]
                prompt = "".join(definition[: max(2, len(definition) // 2)])
                if len(tokenizer.encode(prompt)) <= PROMPT_TOKENS and _compiles(prompt):
                    prompts.append(prompt)
    random.Random(0).shuffle(prompts)
    return prompts[:PROMPTS]


def _training_tokens(tokenizer: Tokenizer) -> list[int]:
    texts: list[Any] = []
    size = 0
    for text in open_sources(["builtin:stdlib"]).sample_texts(0):
        texts.append(tokenizer.encode(text))
        size += len(text)
        if size > 1_000_000:
            break
    return [token for ids in texts for token in ids]
