"""More model than memory: tokens a second against the share of experts found there, at a sixteenth of them to all.

Layers of V2-Lite's exact shape in INT4, random weights: nobody trained the gate, so experts are chosen almost evenly,
the hardest case for any cache. Each size answers the same prompt, from files that the system has cached and from the
disk itself, and has to give the tokens of the model that is wholly in memory. They are drawn, at temperature 1, since
greedily random weights soon repeat themselves, and with them their experts.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

from benchmarks._chart import Line, log_chart
from benchmarks._result import ROOT, Proof, Table
from benchmarks.v2_lite import write_random
from fireflyer.config.model_config import load_config
from fireflyer.config.sizes import show_bytes

LAYERS = 9
SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
PROMPT, WARM, NEW = 32, 32, 32
PICTURE = "expert-memory.svg"


def main() -> Proof:
    """The picture goes to docs/expert-memory.svg."""
    config = load_config("deepseek-v2-lite").replace(num_hidden_layers=LAYERS)
    with tempfile.TemporaryDirectory(prefix="fireflyer-experts-", dir=os.environ.get("FIREFLYER_PROOF_DISK")) as place:
        folder = Path(place) / "model"
        folder.mkdir()
        write_random(folder, config, "int4")
        whole = _child(folder, "all", 0.0, cold=False)
        found = {
            place: [_child(folder, str(share), whole["expert_bytes"], cold=place == "disk") for share in SHARES]
            for place in ("cached", "disk")
        }
    missed = [
        f"at {share:.0%} of the experts, {place}: other tokens than with all in memory"
        for place, results in found.items()
        for share, result in zip(SHARES, results, strict=True)
        if result["token_ids"] != whole["token_ids"]
    ]
    missed += [
        f"the store held {result['resident_bytes']} bytes of the {result['limit_bytes']} allowed"
        for results in found.values()
        for result in results
        if result["resident_bytes"] > result["limit_bytes"]
    ]
    (ROOT / "docs" / PICTURE).write_text(_chart(found, whole), encoding="utf-8")
    for result in (whole, *found["cached"], *found["disk"]):
        del result["token_ids"]
    return Proof(
        {"layers": LAYERS, "shares": list(SHARES), "in_memory": whole, **found},
        {"speeds": _table(found, whole)},
        missed=missed,
    )


def _table(found: dict[str, list[dict[str, Any]]], whole: dict[str, Any]) -> Table:
    rows: list[list[str]] = []
    for share, cached, disk in zip(SHARES, found["cached"], found["disk"], strict=True):
        rows.append(
            [
                f"{share:.0%}, {show_bytes(cached['limit_bytes'])}",
                f"{cached['hit_rate']:.0%}",
                f"{cached['recency_hit_rate']:.0%}",
                f"{cached['tokens_per_s']:.1f}",
                f"{disk['tokens_per_s']:.1f}",
            ]
        )
    rows.append(["no limit", "", "", f"{whole['tokens_per_s']:.1f}", ""])
    columns = [
        "experts in memory",
        "found there",
        "with plain recency",
        "tokens/s, files cached",
        "tokens/s, from the disk",
    ]
    return Table(columns, rows)


def _chart(found: dict[str, list[dict[str, Any]]], whole: dict[str, Any]) -> str:
    lines = [
        Line(name, sorted((max(100 * r["hit_rate"], 1), r["tokens_per_s"]) for r in found[place]), colour)
        for place, name, colour in (("cached", "files cached", "#1f6f8b"), ("disk", "from the disk", "#c8553d"))
    ]
    least = min(x for line in lines for x, _ in line.points)
    lines.append(
        Line("all in memory", [(least, whole["tokens_per_s"]), (100, whole["tokens_per_s"])], "#777777", dashed=True)
    )
    marks = [mark for mark in (1, 2, 5, 10, 20, 50, 100) if mark >= least]
    return log_chart("Decoding with bounded experts, INT4", "experts found in memory, %", "tokens/s", marks, lines)


def _child(folder: Path, share: str, expert_bytes: float, *, cold: bool) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.expert_memory", str(folder), share, str(expert_bytes), str(int(cold))]
    out = subprocess.run(command, capture_output=True, text=True, check=False)
    if out.returncode:
        raise RuntimeError(out.stderr[-2000:])
    return json.loads(out.stdout)


def measure(folder: str, share: str, expert_bytes: str, cold: str) -> dict[str, Any]:
    """One size in a process of its own. expert_bytes: of all experts."""
    from fireflyer import LLM, SamplingParams
    from fireflyer.infer.stored_weights import find_store
    from fireflyer.model.packed_experts import PackedExperts

    if cold == "1":
        _read_from_disk()
    limit = None if share == "all" else int(float(share) * float(expert_bytes))
    llm = LLM(folder, expert_memory=limit, num_speculative_tokens=0)
    prompt = [(37 * i) % llm.config.vocab_size for i in range(PROMPT)]
    llm.generate([prompt], SamplingParams(max_tokens=WARM, temperature=1.0, seed=1, ignore_eos=True))
    before, begun = llm.engine.stats, time.perf_counter()
    params = SamplingParams(max_tokens=NEW, temperature=1.0, seed=2, ignore_eos=True)
    request = llm.make_request([*prompt, 5], params, report_experts=True)
    llm.engine.add(request)
    llm.engine.step()
    read_s = time.perf_counter()
    while llm.engine.unfinished:
        llm.engine.step()
    seconds = time.perf_counter() - read_s
    after, answer = llm.engine.stats, request.answers[0]
    assert begun < read_s
    store = find_store(llm.model)
    layers = [module for module in llm.model.modules() if isinstance(module, PackedExperts)]
    total = sum(layer.packed.shape[0] * layer.packed.shape[1] for layer in layers)
    uses = after.expert_hits + after.expert_misses - before.expert_hits - before.expert_misses
    return {
        "token_ids": answer.tokens[-NEW:],
        "tokens_per_s": (NEW - 1) / seconds,
        "expert_bytes": total,
        "limit_bytes": limit,
        "resident_bytes": after.expert_bytes,
        "hit_rate": (after.expert_hits - before.expert_hits) / uses if uses else 1.0,
        "recency_hit_rate": None if store is None else _recency(answer.experts, store.capacity),
    }


def _recency(experts: list[list[list[int]]], capacity: int) -> float:
    """The hit rate of the same tokens' experts if the least recently used one were given up."""
    held: OrderedDict[tuple[int, int], None] = OrderedDict()
    hits = uses = 0
    for turn, layers in enumerate(experts):
        for layer, chosen in enumerate(layers):
            for expert in chosen:
                key = (layer, expert)
                if turn >= len(experts) // 3:  # by then it is full
                    uses += 1
                    hits += key in held
                held[key] = None
                held.move_to_end(key)
                if len(held) > capacity:
                    held.popitem(last=False)
    return hits / uses


def _read_from_disk() -> None:
    """Every expert is forgotten by the system's cache before it is read."""
    from fireflyer.infer.stored_weights import StoredRows

    read = StoredRows.read

    def cold(self: StoredRows, expert: int, into: Any) -> None:
        descriptor = os.open(self.stored.path, os.O_RDONLY)
        start = self.stored.offset + expert * self.num_bytes
        os.posix_fadvise(descriptor, start, self.num_bytes, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
        read(self, expert, into)

    StoredRows.read = cold


if __name__ == "__main__":
    print(json.dumps(measure(*sys.argv[1:])))
