"""One small training run of an ablation, and what is measured on it; run in processes of their own, a thread each."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # torch itself loads in the processes
    from fireflyer.model.decoder import Decoder
    from fireflyer.text.tokenizer import Tokenizer
    from fireflyer.train.settings import Recipe

SIZE, TOKENS, SEQ_LEN = "500K", 800_000, 256
LAST_STEPS = 50


@dataclass(frozen=True)
class Variant:
    """What is changed of the base recipe. multi_head: ordinary attention in MLA's place, as many parameters."""

    name: str
    overrides: Sequence[str] = ()
    multi_head: bool = False


def run(variant: Variant, seed: int, tokenizer_file: str) -> dict[str, float]:
    """Train it; held-out bits per byte, the last steps' mean MaxVio, MTP acceptance, loss of infilled middles."""
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
    from fireflyer.model import block
    from fireflyer.train.loop import Trainer
    from fireflyer.train.setup import open_inputs, open_state

    if variant.multi_head:
        from benchmarks._multi_head import MultiHeadAttention

        block.LatentAttention = MultiHeadAttention  # pyright: ignore[reportAttributeAccessIssue]
    recipe = base_recipe([*variant.overrides, f"seed={seed}"], tokenizer_file)
    with tempfile.TemporaryDirectory() as folder:
        inputs = open_inputs(recipe, Path(folder), None, lambda event: None)
        trainer = Trainer(
            inputs, open_state(inputs, Path(folder), lambda event: None), Path(folder), lambda event: None
        )
        steps = [trainer.step() for _ in range(trainer.total_steps)]
        scored = trainer.evaluate()
        trainer.close()
    assert scored is not None
    model = trainer.state.model
    return {
        **scored.values,
        "max_vio": fmean(step.max_vio for step in steps[-LAST_STEPS:]),
        "parameters": float(sum(parameter.numel() for parameter in model.parameters())),
        "infilling_loss": infilling_loss(model, inputs.tokenizer),
    }


def base_recipe(overrides: Sequence[str], tokenizer_file: str | None) -> Recipe:
    """The size dial's half a million parameters on the standard library."""
    from fireflyer.train.recipe import load_recipe

    base = [
        f"tokens={TOKENS}",
        f"seq_len={SEQ_LEN}",
        "model.vocab_size=1024",
        "eval_every=1000000",
        "eval_rows=128",
        "eval_samples=0",
        "data.fim_rate=0.0",
        "balance.bias_until='100%'",
        "threads=1",
    ]
    return load_recipe(size=SIZE, overrides=[*base, *overrides], sources=["builtin:stdlib"], tokenizer=tokenizer_file)


def infilling_loss(model: Decoder, tokenizer: Tokenizer, documents: int = 200) -> float:
    """Nats a token of the middles of held-out functions, shown what comes before and after them."""
    import torch

    from fireflyer.data.mixture import open_sources
    from fireflyer.text.special_tokens import FIM_BEGIN, FIM_END, FIM_HOLE

    begin, hole, end = (tokenizer.special_id(name) for name in (FIM_BEGIN, FIM_HOLE, FIM_END))
    losses = []
    source = open_sources(["builtin:stdlib"]).sources[0]
    for parts in source.held_out_documents():
        text = next(parts).text[:400]
        if len(text) < 400:
            continue
        prefix, middle, suffix = (tokenizer.encode(part) for part in (text[:180], text[180:260], text[260:]))
        shown = [tokenizer.bos_id, begin, *prefix, hole, *suffix, end]
        with torch.no_grad():
            logits = model(torch.tensor([[*shown, *middle]]), num_mtp=0).logits[0, len(shown) - 1 : -1]
        losses.append(float(torch.nn.functional.cross_entropy(logits, torch.tensor(middle))))
        if len(losses) == documents:
            break
    return fmean(losses)
