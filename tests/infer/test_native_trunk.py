"""The native decoding step against the decoder itself: every row of two sequences whose blocks lie in disorder."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fireflyer.infer.llm import LLM
from fireflyer.infer.model_runner import ModelRunner
from fireflyer.infer.native_trunk import NativeRows, NativeTrunk, native_trunk
from fireflyer.infer.options import EngineOptions
from fireflyer.infer.pace import Pace
from fireflyer.infer.paged_cache import PagedCache
from fireflyer.infer.sampling_params import SamplingParams
from fireflyer.infer.scheduler import Span
from fireflyer.model import packed
from fireflyer.model.decoder import Decoder
from fireflyer.numerics.native.library import library

pytestmark = pytest.mark.skipif(library() is None, reason="the native kernels were not built: no C compiler")

BLOCK = 5
STEPS = [[(0, 0, 19), (1, 0, 7)], [(1, 7, 8), (0, 19, 22)], [(0, 22, 23), (1, 8, 9)]]
"""By step: (sequence, first row, row after the last)."""


def new_cache(
    model: Decoder, dtype: torch.dtype = torch.float32, layers: int | None = None, blocks: int = 80
) -> PagedCache:
    config = model.config
    count = config.num_hidden_layers + config.num_nextn_predict_layers if layers is None else layers
    return PagedCache(count, blocks, BLOCK, config.latent_dim, config.kv_lora_rank, dtype, model.dtype, model.device)


def made(model: Decoder, cache: PagedCache) -> NativeTrunk:
    trunk = native_trunk(model, cache)
    assert trunk is not None
    return trunk


def sequences(lengths: tuple[int, ...], vocab_size: int, blocks: int = 80) -> list[Any]:
    """Stand-ins for answers: tokens, and blocks that no other has, in random order."""
    draw = random.Random(1)
    free = list(range(1, blocks))
    draw.shuffle(free)
    found = []
    for length in lengths:
        own, free = free[: -(-length // BLOCK)], free[-(-length // BLOCK) :]
        tokens = [draw.randrange(vocab_size) for _ in range(length)]
        found.append(SimpleNamespace(tokens=tokens, blocks=own))
    return found


def rows_of(spans: list[tuple[int, int, int]], answers: list[Any]) -> tuple[list[int], NativeRows]:
    made_spans = [Span(answers[index], start, stop) for index, start, stop in spans]
    tokens = [token for index, start, stop in spans for token in answers[index].tokens[start:stop]]
    return tokens, NativeRows.of(made_spans, BLOCK)


def close(ours: Tensor, theirs: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance * max(1.0, float(theirs.abs().max())))


def check(model: Decoder, oracle: Decoder, tolerance: float = 1e-5) -> None:
    """All rows of all steps, and the experts that each row chose."""
    trunk = made(model, new_cache(model))
    answers = sequences((23, 9), model.config.vocab_size)
    with torch.inference_mode():
        whole = [oracle.trunk(torch.tensor([answer.tokens]), num_mtp=0) for answer in answers]
        for spans in STEPS:
            hidden_ND, routing = trunk.trunk(*rows_of(spans, answers))
            expected = torch.cat([whole[index].hidden_BTD[0, start:stop] for index, start, stop in spans])
            close(hidden_ND, expected, tolerance)
            assert [layer.layer_index for layer in routing] == [layer.layer_index for layer in whole[0].routing]
            for place, layer in enumerate(routing):
                chosen = torch.cat([whole[i].routing[place].indices_NK[start:stop] for i, start, stop in spans])
                assert torch.equal(layer.indices_NK, chosen)
            close(trunk.logits(hidden_ND), oracle.head(expected), tolerance)


@pytest.mark.parametrize("kind", ["V3", "V2"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_attention_heads": 5, "kv_lora_rank": 21, "v_head_dim": 7, "qk_nope_head_dim": 9, "hidden_size": 37},
        {"n_group": 1, "topk_group": 1, "n_shared_experts": 0},
        {"first_k_dense_replace": 3},
        {"tie_word_embeddings": True, "rope_scaling": None},
        {"q_lora_rank": None, "n_shared_experts": 2, "moe_intermediate_size": 20},
    ],
)
def test_every_row_is_the_decoders(make_model: Callable[..., Decoder], kind: str, changes: dict[str, Any]) -> None:
    model = make_model(kind, **changes)
    check(model, model)


def test_weights_in_bf16_are_those_weights(make_model: Callable[..., Decoder]) -> None:
    model = make_model("V3").to(torch.bfloat16)
    oracle = make_model("V3")
    oracle.load_state_dict(model.state_dict())
    check(model, oracle, tolerance=2e-5)


def test_long_sequences_are_read_in_pieces(make_model: Callable[..., Decoder]) -> None:
    model = make_model("V3", max_position_embeddings=1024)
    trunk = made(model, new_cache(model, blocks=150))
    answers = sequences((601,), model.config.vocab_size, blocks=150)
    with torch.inference_mode():
        expected = model.trunk(torch.tensor([answers[0].tokens]), num_mtp=0).hidden_BTD[0]
        hidden_ND, _ = trunk.trunk(*rows_of([(0, 0, 600)], answers))
        close(hidden_ND, expected[:600], 2e-5)
        last_ND, _ = trunk.trunk(*rows_of([(0, 600, 601)], answers))
        close(last_ND, expected[600:], 2e-5)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-5), (torch.int8, 1e-5)])
def test_caches_of_other_kinds_hold_the_same_numbers(
    make_model: Callable[..., Decoder], dtype: torch.dtype, tolerance: float
) -> None:
    """Against torch's own reading and writing of such a cache."""
    model = make_model("V3", num_attention_heads=18)  # more heads than are read at a time
    caches = [new_cache(model, dtype), new_cache(model, dtype)]
    runner = ModelRunner(model, caches[0])
    runner._native = None
    trunk = made(model, caches[1])
    answers = sequences((23, 9), model.config.vocab_size)
    with torch.inference_mode():
        for spans in STEPS:
            batch = runner.batch([Span(answers[index], start, stop) for index, start, stop in spans])
            tokens = [token for span in batch.spans for token in span.answer.tokens[span.start : span.stop]]
            expected = runner.trunk(batch, tokens).hidden_BTD[0]
            hidden_ND, _ = trunk.trunk(tokens, NativeRows.of(batch.spans, BLOCK))
            close(hidden_ND, expected, tolerance)
    used = [slot for answer in answers for slot in answer.blocks]
    if dtype == torch.int8:  # a number at a rounding's edge may fall on either side
        close(caches[0].slots[:, used].float(), caches[1].slots[:, used].float(), 1 / 127)
        close(caches[0].scales[:, used], caches[1].scales[:, used])


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_packed_weights(make_model: Callable[..., Decoder], kind: str, tmp_path: Any) -> None:
    """Against torch's way through the packed layers: rounded inputs may differ where a sum differs in its last bit."""
    from fireflyer.checkpoint.hf import stream_published
    from fireflyer.checkpoint.packed import load_packed, plan_packed

    source = make_model("V3", hidden_size=64, moe_intermediate_size=32)
    plan_packed(source.config, dict(stream_published(source)), kind).write(tmp_path)
    model = load_packed(tmp_path)
    assert isinstance(model.lm_head, packed.PackedLinear)
    check_hidden = made(model, new_cache(model))
    answers = sequences((23, 9), model.config.vocab_size)
    with torch.inference_mode():
        whole = [model.trunk(torch.tensor([answer.tokens]), num_mtp=0).hidden_BTD[0] for answer in answers]
        for spans in STEPS:
            hidden_ND, _ = check_hidden.trunk(*rows_of(spans, answers))
            expected = torch.cat([whole[index][start:stop] for index, start, stop in spans])
            off_N = (hidden_ND - expected).norm(dim=-1) / expected.norm(dim=-1)
            assert float(off_N.median()) < 0.02


def test_mtp_rows_are_the_decoders(make_model: Callable[..., Decoder]) -> None:
    model = make_model("V3", num_nextn_predict_layers=2)
    trunk = made(model, new_cache(model))
    answers = sequences((20,), model.config.vocab_size)
    tokens = answers[0].tokens
    with torch.inference_mode():
        out = model.trunk(torch.tensor([tokens]))
        hidden_ND, _ = trunk.trunk(*rows_of([(0, 0, 20)], answers))
        for depth, expected in enumerate(out.mtp_hidden):
            stop = 20 - depth - 1
            _, rows = rows_of([(0, 0, stop)], answers)
            hidden_ND = trunk.mtp(depth, hidden_ND[:stop], tokens[depth + 1 :], rows)
            close(hidden_ND, expected[0])


def test_weights_that_change_are_followed(make_model: Callable[..., Decoder]) -> None:
    """In place, as training does, and moved; fp32 norms are read in place, bf16 ones are copies."""
    for dtype in (torch.float32, torch.bfloat16):
        model, oracle = make_model("V3").to(dtype), make_model("V3")
        trunk = made(model, new_cache(model))
        answers = sequences((9,), model.config.vocab_size)
        with torch.no_grad():
            trunk.trunk(*rows_of([(0, 0, 9)], answers))
            for parameter in model.parameters():
                parameter.mul_(1.25)
            for _, bias in model.gate_biases():
                bias.mul_(0.5)
            model.model.norm.weight.data = model.model.norm.weight.data * 2
            oracle.load_state_dict(model.state_dict())
            expected = oracle.trunk(torch.tensor([answers[0].tokens]), num_mtp=0).hidden_BTD[0]
            close(trunk.trunk(*rows_of([(0, 0, 9)], answers))[0], expected, 2e-5)


def test_the_number_of_threads_changes_no_bit(
    make_model: Callable[..., Decoder], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("V3")
    answers = sequences((23, 9), model.config.vocab_size)
    found = []
    for threads in (1, 2, 3):
        monkeypatch.setattr(Pace, "threads", lambda self, rows, most, threads=threads: threads)
        trunk = made(model, new_cache(model))
        with torch.inference_mode():
            found.append(torch.cat([trunk.trunk(*rows_of(spans, answers))[0] for spans in STEPS]))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_the_engine_takes_it_and_says_what_torch_says(make_model: Callable[..., Decoder]) -> None:
    """Short spans by the kernels, long pieces of prompts by torch, in the same steps; with drafts and experts told."""
    model = make_model("V3", num_nextn_predict_layers=1)
    draw = random.Random(3)
    prompts = [[draw.randrange(10, 300) for _ in range(length)] for length in (3, 90, 30, 120, 5)]
    params = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
    options = EngineOptions(max_step_tokens=100, block_size=4)
    native, plain = (LLM.from_model(model, options=options) for _ in range(2))
    assert native.engine._runner._native is not None
    plain.engine._runner._native = None
    ours, theirs = native.generate(prompts, params), plain.generate(prompts, params)
    assert [o.outputs[0].token_ids for o in ours] == [o.outputs[0].token_ids for o in theirs]


def test_switched_off_it_is_absent(make_model: Callable[..., Decoder], monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("V3")
    monkeypatch.setattr("fireflyer.infer.native_trunk.library", lambda: None)
    assert native_trunk(model, new_cache(model)) is None
    monkeypatch.undo()
    assert native_trunk(model.to(torch.float64), new_cache(model)) is None
