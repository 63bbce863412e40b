"""The reasoning demo from three seeds, each beside its controls: what GRPO adds that they don't.

The controls begin from the same cold start and have the same compute: more SFT on its examples; GRPO whose rewards are
dealt out anew at random among the answers of each step; GRPO that pays for the form alone.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch

from benchmarks._result import ROOT, Proof, Table
from fireflyer.checkpoint.hf import load_model
from fireflyer.checkpoint.run import newest_good_checkpoint
from fireflyer.data.draws import permutation
from fireflyer.demo.carrying import harder, question
from fireflyer.demo.reason import COLD_START, examine
from fireflyer.text.tokenizer import Tokenizer
from fireflyer.train import grpo_run
from fireflyer.train.environments import Environment, open_environment
from fireflyer.train.judges import Grade, Problem
from fireflyer.train.loop import train
from fireflyer.train.post_training_settings import GrpoSettings
from fireflyer.train.recipe import load_recipe
from fireflyer.train.rollout import Rollouts
from fireflyer.train.sft import open_chats

SEEDS = (0, 1, 2)
GAIN, ACCURACY, SECONDS, SPEED = 0.30, 0.90, 600, 4.0
HELPS = 0.05
"""A control that must not help may differ by this much."""

_TRAINING, _ROLLOUT = 3, 1
"""Forward passes that a token costs: forward and backward, and being written."""


class _Dealt:
    """An environment whose grades are dealt out anew among the answers that are graded together."""

    def __init__(self, real: Environment) -> None:
        self._real, self._calls = real, 0
        self.name, self.num_problems = real.name, real.num_problems

    def fingerprint(self) -> str:
        return self._real.fingerprint()

    def problem(self, index: int) -> Problem:
        return self._real.problem(index)

    def grade(self, problems: Sequence[Problem], answers: Sequence[str]) -> list[Grade]:
        self._calls += 1
        grades = self._real.grade(problems, answers)
        return [grades[place] for place in permutation(len(grades), "dealt", self._calls)]

    def close(self) -> None:
        self._real.close()


def main() -> Proof:
    """Three demos with three controls each."""
    results, shown, speed = [], "", {}
    for seed in SEEDS:
        with tempfile.TemporaryDirectory() as folder:
            text, summary = _reason(seed, folder)
            shown = shown or text.replace(folder, "runs")
            if seed == SEEDS[0]:
                speed = _rollout_speed(Path(folder) / "demo-reason" / COLD_START)
            results.append({"seed": seed, **summary, "controls": _controls(seed, Path(folder) / "demo-reason")})
    figures = {
        "seeds": results,
        "accuracy_min": min(r["accuracy"] for r in results),
        "accuracy_median": median(r["accuracy"] for r in results),
        "gained_min": min(r["gained"] for r in results),
        "seconds_max": max(r["cold_start_s"] + r["grpo_s"] for r in results),
        "rollouts": speed,
        "gap_max": max(r["gap"] for r in results),
        "control_max": {name: max(r["controls"][name]["accuracy"] for r in results) for name in results[0]["controls"]},
    }
    columns = [
        "seed",
        "the demo's model",
        "cold start",
        "pass@8 of it",
        "GRPO",
        "more SFT",
        "dealt rewards",
        "form only",
    ]
    rows = [_row(result) for result in results]
    spread = ["mean", *(f"{mean(float(row[i][:-1]) for row in rows):.1f}%" for i in range(1, len(columns)))]
    per_second = [[name, f"{speed[name]:,.0f}"] for name in ("fireflyer", "transformers")]
    tables = {
        "controls": Table(columns, [*rows, spread]),
        "rollouts": Table(["rollouts by", "tokens/s"], [*per_second, ["ratio", f"{speed['ratio']:.1f}"]]),
    }
    missed = [line for result in results for line in _missed(result)]
    if speed["ratio"] < SPEED:
        missed.append(f"rollouts {SPEED:g} times as fast as transformers' generate: {speed['ratio']:.2f}")
    outputs = {"run": f"$ fireflyer demo --reason\n{shown}", "result": shown[shown.index("\n\n") + 2 :]}
    return Proof(figures, tables, outputs, missed)


def _reason(seed: int, folder: str) -> tuple[str, dict[str, Any]]:
    """What the command prints (the demo before it left out), and the summary it leaves."""
    command = [sys.executable, "-m", "fireflyer", "demo", "--seed", str(seed), "--run", f"{folder}/demo"]
    subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=True)
    done = subprocess.run([*command, "--reason"], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout, json.loads(Path(f"{folder}/demo-reason/summary.json").read_text(encoding="utf-8"))


def _rollout_speed(run: Path) -> dict[str, float]:
    """One step's rollouts, by the engine and by transformers' generate with log-probabilities, in turn; medians."""
    from transformers import DeepseekV3ForCausalLM

    model, tokenizer = load_model(run, dtype=torch.float32), Tokenizer.from_file(run)
    peer: Any = DeepseekV3ForCausalLM.from_pretrained(newest_good_checkpoint(run), dtype=torch.float32).eval()
    problems = harder(0, 16, held_out=10)
    prompts = [tokenizer.encode_chat([{"role": "user", "content": question(p)}]) for p in problems]
    ids_BT = torch.tensor([prompt for prompt in prompts for _ in range(8)])
    rollouts = Rollouts(model, tokenizer, max_length=80, at_once=128)
    found: dict[str, list[float]] = {"fireflyer": [], "transformers": []}
    for turn in range(7):
        began = time.perf_counter()
        groups = rollouts.answer(prompts, list(range(turn * 16, turn * 16 + 16)), group_size=8, max_tokens=58)
        tokens = sum(len(answer.token_ids) for group in groups for answer in group)
        found["fireflyer"].append(tokens / (time.perf_counter() - began))
        began = time.perf_counter()
        with torch.inference_mode():
            out = peer.generate(
                ids_BT,
                attention_mask=torch.ones_like(ids_BT),
                do_sample=True,
                top_k=0,
                max_new_tokens=58,
                eos_token_id=tokenizer.eos_id,
                pad_token_id=tokenizer.pad_id,
                return_dict_in_generate=True,
                output_logits=True,
            )
            torch.stack(out.logits, 1).log_softmax(-1)
        tokens = int((out.sequences[:, ids_BT.shape[1] :] != tokenizer.pad_id).sum())
        found["transformers"].append(tokens / (time.perf_counter() - began))
    ours, theirs = median(found["fireflyer"]), median(found["transformers"])
    return {"fireflyer": ours, "transformers": theirs, "ratio": ours / theirs}


def _controls(seed: int, folder: Path) -> dict[str, dict[str, Any]]:
    environment = f"grpo.environment={json.dumps(str(folder / 'problems.jsonl'))}"
    start = str(folder / COLD_START)

    def grpo(name: str, *settings: str) -> Path:
        overrides = [f"seed={seed}", environment, "eval_every=0", *settings]
        recipe = load_recipe("spark-grpo", overrides, init_from=start, base="grpo")
        train(recipe, folder / name, opener=grpo_run.open_grpo)
        return folder / name

    runs = {"more SFT": _more_sft(seed, folder, start), "form only": grpo("form", "grpo.answer_weight=0.0")}
    grpo_run.open_environment = _dealt
    try:
        runs["dealt rewards"] = grpo("dealt")
    finally:
        grpo_run.open_environment = open_environment
    return {name: vars(examine(run, seed)[0]) for name, run in runs.items()}


def _dealt(settings: GrpoSettings, seed: int) -> _Dealt:
    return _Dealt(open_environment(settings, seed))


def _more_sft(seed: int, folder: Path, start: str) -> Path:
    """As many passes of tokens through the model as the GRPO stage has, prompts and answers, rollouts included."""
    recipe = load_recipe("spark-grpo", init_from=start, base="grpo")
    cold = load_recipe("spark-cold-start", sources=[str(folder / "cold-start.jsonl")], init_from=start, base="sft")
    assert recipe.steps is not None
    passes = recipe.steps * recipe.batch_size * cold.seq_len * (_TRAINING + _ROLLOUT)
    steps = passes // (cold.batch_size * cold.seq_len * _TRAINING)
    overrides = [f"seed={seed}", f"steps={steps}", "schedule.lr=3e-4"]
    recipe = load_recipe(
        "spark-cold-start", overrides, sources=[str(folder / "cold-start.jsonl")], init_from=start, base="sft"
    )
    train(recipe, folder / "more-sft", opener=open_chats)
    return folder / "more-sft"


def _row(result: dict[str, Any]) -> list[str]:
    controls = result["controls"]
    shares = [result["before"]["accuracy"], result["cold_start"]["accuracy"], result["cold_start"]["pass_at_8"]]
    shares += [result["accuracy"], *(controls[name]["accuracy"] for name in ("more SFT", "dealt rewards", "form only"))]
    return [str(result["seed"]), *(f"{share:.1%}" for share in shares)]


def _missed(result: dict[str, Any]) -> list[str]:
    seed, accuracy, cold = result["seed"], result["accuracy"], result["cold_start"]["accuracy"]
    seconds = result["cold_start_s"] + result["grpo_s"]
    missed = []
    if result["gained"] < GAIN:
        missed.append(f"seed {seed}: GRPO adds {GAIN:.0%} of held-out accuracy: {result['gained']:.1%}")
    if accuracy < ACCURACY:
        missed.append(f"seed {seed}: {ACCURACY:.0%} right after GRPO: {accuracy:.1%}")
    if seconds > SECONDS:
        missed.append(f"seed {seed}: both stages within {SECONDS} s: {seconds:.0f} s")
    for name, score in result["controls"].items():
        if score["accuracy"] >= accuracy:
            missed.append(f"seed {seed}: GRPO beats {name}: {accuracy:.1%} against {score['accuracy']:.1%}")
        if name != "more SFT" and score["accuracy"] > cold + HELPS:
            missed.append(f"seed {seed}: {name} must not help: {cold:.1%} to {score['accuracy']:.1%}")
    return missed
