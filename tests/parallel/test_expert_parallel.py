"""Experts on 1, 2 and 4 ranks give what one process gives, whatever the placement, redundant experts among them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fireflyer import LLM, SamplingParams, save_model
from fireflyer.config import ModelConfig
from fireflyer.errors import UserError
from fireflyer.infer.expert_parallel import ExpertParallelLLM
from fireflyer.infer.options import EngineOptions
from fireflyer.infer.outputs import RequestOutput
from fireflyer.model.decoder import Decoder, init_weights_
from fireflyer.model.experts import Experts
from fireflyer.parallel.placed_experts import PlacedExperts
from fireflyer.parallel.placement import Cluster, Placement, place_experts
from tests.gloo_ranks import Ranks

EXPERTS, PROMPTS = 8, [[5, 9, 11, 3], [7, 7, 2], [4] * 30, [12, 60, 33, 9, 1], [8, 8]]
SHAPE = {
    **{"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3, "first_k_dense_replace": 1},
    **{"intermediate_size": 48, "num_attention_heads": 2, "q_lora_rank": 16, "kv_lora_rank": 16},
    **{"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": EXPERTS},
    **{"n_shared_experts": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 2, "topk_group": 1},
    **{"routed_scaling_factor": 2.5, "num_nextn_predict_layers": 1, "max_position_embeddings": 128},
    **{"initializer_range": 0.3},
}


def _placements(ranks: int) -> list[Placement]:
    """In order; balanced for some loads; one expert everywhere; at random."""
    draw = random.Random(ranks)
    slots = EXPERTS + ranks * 2
    placed = [
        place_experts([draw.random() for _ in range(EXPERTS)], Cluster(slots, 2, nodes, ranks)) for nodes in (1, ranks)
    ]
    everywhere = [*range(EXPERTS), *[3] * (2 * ranks)]
    draw.shuffle(everywhere)
    return [Placement(tuple(range(EXPERTS)), ranks), *placed, Placement(tuple(everywhere), ranks)]


def _tokens(rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A rank's own, of another number on each rank and none on the last of several."""
    generator = torch.Generator().manual_seed(rank)
    count = 0 if rank == 3 else 5 + 4 * rank
    x_ND = torch.randn(count, SHAPE["hidden_size"], generator=generator)
    indices_NK = torch.stack(
        [torch.randperm(EXPERTS, generator=generator)[:2] for _ in range(count)] or [torch.zeros(2).long()]
    )[:count]
    return x_ND, indices_NK, torch.rand(count, 2, generator=generator)


def _on_a_rank(size: int, checkpoint: str) -> tuple[float, Any] | None:
    """On the first `size` ranks: how far a layer is from one process, and what the model answers."""
    group = dist.new_group(list(range(size)))
    return (_layer(group), _answers(group, checkpoint)) if dist.get_rank() < size else None


@torch.inference_mode()
def _layer(group: dist.ProcessGroup) -> float:
    rank, ranks = group.rank(), group.size()
    config = ModelConfig.from_dict(SHAPE)
    experts = Experts(config)
    generator = torch.Generator().manual_seed(99)
    for parameter in experts.parameters():
        parameter.normal_(0, 0.1, generator=generator)
    x_ND, indices_NK, weights_NK = _tokens(rank)
    worst = 0.0
    for placement in _placements(ranks):
        placed = PlacedExperts(config, placement, group, torch.float32)
        placed.fill(lambda expert: (experts.gate_up_proj[expert], experts.down_proj[expert]))
        placed(x_ND, indices_NK, weights_NK)
        y_ND = placed(x_ND, indices_NK, weights_NK)
        naive = torch.zeros_like(x_ND)
        for n, (chosen, weights) in enumerate(zip(indices_NK.tolist(), weights_NK, strict=True)):
            for expert, weight in zip(chosen, weights, strict=True):
                gate, up = (experts.gate_up_proj[expert] @ x_ND[n]).chunk(2)
                naive[n] += weight * (experts.down_proj[expert] @ (torch.nn.functional.silu(gate) * up))
        worst = max(worst, float((y_ND - naive).abs().max()) if len(x_ND) else 0.0)
        counted = torch.bincount(indices_NK.flatten(), minlength=EXPERTS)
        assert torch.equal(placed.chosen_E, 2 * counted)
        slots = placed.slots(indices_NK).tolist()
        assert slots == [[placement.slot_of(e, n, rank) for e in row] for n, row in enumerate(indices_NK.tolist())]
    return worst


def _told(output: RequestOutput) -> tuple[list[int], float]:
    """What was answered, and its log-probability."""
    answer = output.outputs[0]
    assert answer.logprobs is not None
    pairs = zip(answer.logprobs, answer.token_ids, strict=True)
    return list(answer.token_ids), sum(each[token].logprob for each, token in pairs)


def _answers(group: dist.ProcessGroup, checkpoint: str) -> Any:
    rank, ranks = group.rank(), group.size()
    mine = PROMPTS[rank::ranks] if rank != 3 else []
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, logprobs=1)
    llm = ExpertParallelLLM(checkpoint, group, options=EngineOptions(num_speculative_tokens=0, prefix_cache=False))
    said = []
    for placement in _placements(ranks):
        llm.place({1: placement, 2: placement})
        outputs = llm.generate(mine, params)
        said.append([_told(o) for o in outputs])
        loads = llm.loads()
    with pytest.raises(UserError):
        llm.generate([[5] * 200] if rank == ranks - 1 else mine)
    again = [_told(o) for o in llm.generate(mine, params)]
    assert [ids for ids, _ in again] == [ids for ids, _ in said[-1]]
    return mine, said, loads


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = Decoder(ModelConfig.from_dict(SHAPE))
    init_weights_(model, torch.Generator().manual_seed(0))
    path = tmp_path_factory.mktemp("model") / "tiny"
    save_model(model, path)
    return path


@pytest.fixture(scope="module")
def four() -> Iterator[Ranks]:
    ranks = Ranks(4)
    yield ranks
    ranks.close()


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_layer_and_answers_are_those_of_one_process_for_every_placement(four: Ranks, size: int, checkpoint: Path):
    told = [each for each in four.run(_on_a_rank, size, str(checkpoint)) if each is not None]
    assert len(told) == size
    assert max(worst for worst, _ in told) < 1e-6
    found = [answers for _, answers in told]
    params = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, logprobs=1)
    llm = LLM(checkpoint, num_speculative_tokens=0)
    answered = 0
    for mine, by_placement, loads in found:
        assert loads == found[0][2]  # of all ranks, on every rank
        for output, *said in zip(llm.generate(mine, params), *by_placement, strict=True) if mine else ():
            ids_alone, logprob_alone = _told(output)
            for ids, logprob in said:
                assert ids == ids_alone
                assert logprob == pytest.approx(logprob_alone, abs=1e-4)
            answered += 1
    assert answered >= len(PROMPTS) - 1
    rows = sum(len(prompt) + 12 - 1 for mine, *_ in found for prompt in mine)
    assert [sum(counts) for counts in found[0][2].values()] == [2 * rows] * 2


def test_refusals(checkpoint: Path, tmp_path: Path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        group = dist.group.WORLD
        with pytest.raises(UserError, match="layer 1: no placement of 8 experts on 1 ranks"):
            ExpertParallelLLM(checkpoint, group, {1: Placement(tuple(range(8)), 2)})
        with pytest.raises(UserError, match="drafts are for one process"):
            ExpertParallelLLM(checkpoint, group, options=EngineOptions())
    finally:
        dist.destroy_process_group()
