"""What each part of the recipe is good for, at a size that two cores train by the dozen: three seeds of every variant.

Half a million parameters, 0.8M tokens of the standard library, one tokenizer. Directions as the V3 report found them at
15.7B and 228.7B (its tables 4 and 5, section 4.5) and V2's appendix for MLA; at this size they need not hold, and the
page says where they did not.
"""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from benchmarks._ablation import Variant, base_recipe, run
from benchmarks._result import Proof, Table
from fireflyer.config import ModelConfig
from fireflyer.cost.parameters import cache_bytes_per_token, count_parameters

Seen = dict[str, list[dict[str, float]]]
"""By variant, what was measured on each seed."""

SEEDS = (0, 1, 2)
RATES = (1e-3, 2.5e-3, 5e-3)
_NO_MTP = ("model.num_nextn_predict_layers=0",)
_DENSE = (*_NO_MTP, "model.first_k_dense_replace=3")
BASE = Variant("base")
BALANCE = (
    Variant("none", ("balance.bias_speed=0.0", "balance.sequence_alpha=0.0")),
    Variant("auxiliary loss 0.003", ("balance.bias_speed=0.0", "balance.sequence_alpha=3e-3")),
    Variant("auxiliary loss 0.03", ("balance.bias_speed=0.0", "balance.sequence_alpha=3e-2")),
    Variant("gate bias", ("balance.sequence_alpha=0.0",)),
    Variant("gate bias, sequence-wise loss 0.003", ("balance.sequence_alpha=3e-3",)),
    Variant("gate bias, standing still for the last 10 %", ("balance.bias_until='90%'",)),
)
NO_MTP = Variant("without MTP", _NO_MTP)
DENSE = Variant("dense", _DENSE)
MULTI_HEAD = Variant("multi-head", (), multi_head=True)
FIM = Variant("FIM at 0.1", ("data.fim_rate=0.1",))
FREE = Variant("routing without groups", ("model.n_group=1", "model.topk_group=1"))


def main() -> Proof:
    """Every variant on every seed; the optimizers' rates are tuned on the first seed."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = _tokenizer(Path(folder))
        dense = _dense()
        variants = [BASE, *BALANCE, NO_MTP, dense, MULTI_HEAD, FIM, FREE]
        sweep = {name: [_at(name, rate) for rate in RATES] for name in ("adamw", "muon")}
        tuned = _run_all([(variant, SEEDS[0]) for variants in sweep.values() for variant in variants], tokenizer)
        best = {
            name: min(tried, key=lambda v: tuned[v.name, SEEDS[0]]["bits_per_byte"]) for name, tried in sweep.items()
        }
        jobs = [(variant, seed) for variant in variants for seed in SEEDS]
        jobs += [(variant, seed) for variant in best.values() for seed in SEEDS[1:]]
        found = tuned | _run_all(jobs, tokenizer)
    seen = {name: [found[name, seed] for seed in SEEDS if (name, seed) in found] for name, _ in found}
    parts = (BASE, NO_MTP, dense, MULTI_HEAD, FIM, FREE)
    tables = {
        "balance": _table(seen, "balance", [BASE.name, *(v.name for v in BALANCE)], ["bits_per_byte", "max_vio"]),
        "parts": _table(
            seen,
            "variant",
            [variant.name for variant in parts],
            ["bits_per_byte", "parameters"],
        ),
        "optimizers": _table(seen, "optimizer", [v.name for tried in sweep.values() for v in tried], ["bits_per_byte"]),
    }
    model = base_recipe([], None).model
    width = _multi_head_cache(model)
    figures = {
        "runs": seen,
        "mtp_acceptance": fmean(r["mtp_acceptance"] for r in seen[BASE.name]),
        "infilling_loss": {v.name: fmean(r["infilling_loss"] for r in seen[v.name]) for v in (BASE, FIM)},
        "cache_numbers_per_token": {"mla": cache_bytes_per_token(model, 1), "multi_head": width},
        "muon_best": best["muon"].name,
        "adamw_best": best["adamw"].name,
    }
    return Proof(figures, tables, missed=_directions(seen, figures, best))


def _multi_head_cache(model: ModelConfig) -> int:
    from benchmarks._multi_head import head_width

    return model.num_hidden_layers * 2 * model.num_attention_heads * head_width(model)


def _directions(seen: Seen, figures: dict[str, Any], best: dict[str, Variant]) -> list[str]:
    """Where the direction was not the report's, in words."""

    def mean(name: str, key: str = "bits_per_byte") -> float:
        return fmean(run[key] for run in seen[name])

    claims = {
        "the gate bias balances better than nothing": mean("base", "max_vio") < mean("none", "max_vio"),
        "the gate bias costs less loss than an auxiliary loss that balances as well": mean("base")
        <= mean("auxiliary loss 0.03"),
        "MTP doesn't harm the main head": mean("base") <= mean("without MTP") * 1.005,
        "experts beat a dense model of the same active size": mean("without MTP") < mean("dense"),
        "MLA is no worse than multi-head attention": mean("base") <= mean("multi-head") * 1.005,
        "FIM leaves ordinary text alone": mean("FIM at 0.1") <= mean("base") * 1.01,
        "FIM teaches infilling": figures["infilling_loss"]["FIM at 0.1"] < figures["infilling_loss"]["base"],
        "groups cost nothing": mean("base") <= mean("routing without groups") * 1.005,
        "Muon beats AdamW at tuned rates": mean(best["muon"].name) < mean(best["adamw"].name),
    }
    return [claim for claim, holds in claims.items() if not holds]


def _tokenizer(folder: Path) -> str:
    from fireflyer.data.mixture import open_sources
    from fireflyer.text.tokenizer import Tokenizer

    Tokenizer.train(open_sources(["builtin:stdlib"]).sample_texts(0), 1024).save(folder)
    return str(folder / "tokenizer.json")


def _dense() -> Variant:
    """No experts, the dense layers as wide as makes the active parameters those of the model without MTP."""
    target = count_parameters(base_recipe(_NO_MTP, None).model).active
    widths = range(8, 2048, 8)
    width = min(
        widths,
        key=lambda w: abs(
            count_parameters(base_recipe([*_DENSE, f"model.intermediate_size={w}"], None).model).active - target
        ),
    )
    return Variant(DENSE.name, (*DENSE.overrides, f"model.intermediate_size={width}"))


def _at(optimizer: str, rate: float) -> Variant:
    settings = (f"optimizer.name={optimizer}", f"schedule.lr={rate}", f"schedule.cosine_lr={rate / 10}")
    return Variant(f"{optimizer} at {rate:g}", settings)


def _run_all(jobs: Sequence[tuple[Variant, int]], tokenizer: str) -> dict[tuple[str, int], dict[str, float]]:
    context = multiprocessing.get_context("spawn")
    with context.Pool(multiprocessing.cpu_count(), maxtasksperchild=1) as pool:
        results = pool.starmap(run, [(variant, seed, tokenizer) for variant, seed in jobs], chunksize=1)
    return {(variant.name, seed): result for (variant, seed), result in zip(jobs, results, strict=True)}


def _table(seen: Seen, head: str, names: Sequence[str], keys: Sequence[str]) -> Table:
    rows = [[name, *(_cell([run[key] for run in seen[name]], key) for key in keys)] for name in names]
    return Table([head, *(key.replace("_", " ") for key in keys)], rows)


def _cell(values: Sequence[float], key: str) -> str:
    if key == "parameters":
        return f"{values[0]:,.0f}"
    spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
    return f"{fmean(values):.3f}{spread}"
