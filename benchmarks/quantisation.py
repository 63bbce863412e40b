"""What INT8 and INT4 cost in quality: two models trained here, each against its own fp32 weights on held-out text.

`spark` is the demo's arithmetic, where one wrong token spoils an answer; `ember` writes Python after a short training,
its predictions spread as a language model's are. The head of INT4 is chosen by these figures.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks._result import ROOT, Proof, Table
from fireflyer.checkpoint.packed import pack_checkpoint
from fireflyer.checkpoint.published import open_checkpoint
from fireflyer.data.held_out import HeldOutRows, held_out_rows
from fireflyer.data.mixture import open_sources
from fireflyer.evaluate.divergence import divergence
from fireflyer.evaluate.speculation import mtp_acceptance
from fireflyer.infer.llm import LLM
from fireflyer.infer.sampling_params import SamplingParams
from fireflyer.model.packed import PackedFormat
from fireflyer.text.tokenizer import Tokenizer

EMBER_STEPS = 300
PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 64, 24, 32
FORMATS = {
    "int8": PackedFormat("int8"),
    "int4": PackedFormat("int4"),
    "int4 with its head too": PackedFormat("int4", head="int4"),
}
FLOORS = {"int8": (0.001, 0.98), "int4": (0.01, 0.95)}
"""Most KL in nats, least agreement on the likeliest token."""


def main() -> Proof:
    """Trains both, in about ten minutes on two quiet cores."""
    with tempfile.TemporaryDirectory() as folder:
        spark, ember = Path(folder) / "spark", Path(folder) / "ember"
        _fireflyer("demo", "--run", str(spark))
        _fireflyer("pretrain", "--recipe", "ember", "--run", str(ember), "--set", f"steps={EMBER_STEPS}")
        found = {"spark": _measure(spark, "builtin:arithmetic", 70), "ember": _measure(ember, "builtin:stdlib", 256)}
    return _proof(found)


def _fireflyer(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "fireflyer", *arguments], cwd=ROOT, stdout=subprocess.DEVNULL, check=True)


def _measure(run: Path, source: str, seq_len: int) -> dict[str, dict[str, Any]]:
    checkpoint, tokenizer = open_checkpoint(run), Tokenizer.from_file(run)
    rows = held_out_rows(open_sources([source], seed=0, held_out=0.01), tokenizer, seq_len, 96)
    full = LLM(run, num_speculative_tokens=0)
    prompts = _prompts(rows)
    expected = _greedy(full, prompts)
    found: dict[str, dict[str, Any]] = {"fp32": {"mtp_acceptance": _acceptance(full, prompts, expected)}}
    for name, fmt in FORMATS.items():
        llm = LLM.from_model(pack_checkpoint(checkpoint, fmt), tokenizer)
        answers = _greedy(llm, prompts)
        found[name] = asdict(divergence(full.model, llm.model, rows)) | {
            "same_answers": sum(a == b for a, b in zip(answers, expected, strict=True)) / len(prompts),
            "same_tokens_from_start": sum(map(_common, answers, expected)) / sum(map(len, expected)),
            "mtp_acceptance": _acceptance(llm, prompts, answers),
        }
    return found


def _prompts(rows: HeldOutRows) -> list[list[int]]:
    whole = [row for batch in rows.batches for row in batch.input_ids_BT.tolist()]
    return [row[:PROMPT_TOKENS] for row in whole[:PROMPTS]]


def _greedy(llm: LLM, prompts: list[list[int]]) -> list[list[int]]:
    params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0)
    return [list(output.outputs[0].token_ids) for output in llm.generate(prompts, params)]


def _common(one: list[int], other: list[int]) -> int:
    """Tokens before the first difference."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _acceptance(llm: LLM, prompts: list[list[int]], answers: list[list[int]]) -> float:
    sequences = [([*prompt, *answer], len(prompt)) for prompt, answer in zip(prompts, answers, strict=True)]
    return mtp_acceptance(llm.model, sequences) or 0.0


def _proof(found: dict[str, dict[str, dict[str, Any]]]) -> Proof:
    rows, missed = [], []
    for model, formats in found.items():
        rows.append([model, "fp32", *["-"] * 5, f"{formats['fp32']['mtp_acceptance']:.1%}"])
        for name in FORMATS:
            f = formats[name]
            rows.append(
                [
                    model,
                    name,
                    f"{f['loss']:.4f}",
                    f"{f['loss'] - f['reference_loss']:+.4f}",
                    f"{f['kl']:.2e}",
                    f"{f['agreement']:.2%}",
                    f"{f['same_answers']:.0%}, {f['same_tokens_from_start']:.0%}",
                    f"{f['mtp_acceptance']:.1%}",
                ]
            )
            kl, agreement = FLOORS.get(name, (float("inf"), 0.0))
            if f["kl"] > kl:
                missed.append(f"{model} {name}: KL at most {kl} nats: {f['kl']:.2e}")
            if f["agreement"] < agreement:
                missed.append(
                    f"{model} {name}: at least {agreement:.0%} of first choices the same: {f['agreement']:.1%}"
                )
    columns = [
        "model",
        "weights",
        "loss",
        "over fp32",
        "KL, nats",
        "same first choice",
        "greedy answers",
        "MTP accepted",
    ]
    return Proof(found, {"quality": Table(columns, rows)}, missed=missed)
