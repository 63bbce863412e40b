"""Rollouts against the trainer's own pass over the same ids (pain: rollout and trainer disagree)."""

from __future__ import annotations

import pytest
import torch

from fireflyer.errors import UserError
from fireflyer.model.decoder import Decoder, init_weights_
from fireflyer.text.tokenizer import Tokenizer
from fireflyer.train.policy import chosen_logprobs
from fireflyer.train.rollout import Rollout, Rollouts
from tests.tiny_run import MODEL, tiny_recipe

MAX_TOKENS = 12


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(["alpha beta gamma 0123456789"], MODEL["vocab_size"])


@pytest.fixture
def model(tokenizer: Tokenizer) -> Decoder:
    config = tiny_recipe("builtin:arithmetic").model
    # Larger weights, and fp32 itself is off by 1e-5, as its difference from fp64 shows.
    model = Decoder(config.replace(eos_token_id=tokenizer.eos_id, initializer_range=0.15))
    init_weights_(model, torch.Generator().manual_seed(0))
    return model


def _prompts(count: int) -> list[list[int]]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(20, 200, (5 + 7 * n,), generator=draw).tolist() for n in range(count)]


def _trainer_view(model: Decoder, prompt: list[int], rollout: Rollout) -> tuple[list[float], list[list[list[int]]]]:
    """Log-probabilities and experts of the answer's tokens by one plain pass."""
    ids = torch.tensor([[*prompt, *rollout.token_ids]])
    out = model.trunk(ids[:, :-1], num_mtp=0)
    first = len(prompt) - 1
    logp, _ = chosen_logprobs(out.hidden_BTD[0, first:], model.head_weight, ids[0, first + 1 :])
    experts = [[layer.indices_NK[row].tolist() for layer in out.routing] for row in range(first, ids.shape[1] - 1)]
    return logp.tolist(), experts


def test_the_engines_logprobs_are_the_trainers_before_and_after_an_update(model: Decoder, tokenizer: Tokenizer):
    rollouts = Rollouts(model, tokenizer, max_length=64, at_once=8, record_experts=True)
    for update in range(2):
        prompts = _prompts(3)
        groups = rollouts.answer(prompts, [7, 8, 9], group_size=4, max_tokens=MAX_TOKENS)
        assert [len(group) for group in groups] == [4, 4, 4]
        for prompt, group in zip(prompts, groups, strict=True):
            assert len({tuple(rollout.token_ids) for rollout in group}) > 1
            for rollout in group:
                logp, experts = _trainer_view(model, prompt, rollout)
                assert rollout.logprobs == pytest.approx(logp, abs=1e-5), update
                assert rollout.experts == experts
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)


def test_the_same_seeds_give_the_same_answers_and_others_others(model: Decoder, tokenizer: Tokenizer):
    def answers(seeds: list[int]) -> list[list[Rollout]]:
        rollouts = Rollouts(model, tokenizer, max_length=64, at_once=5)
        return rollouts.answer(_prompts(2), seeds, group_size=3, max_tokens=MAX_TOKENS)

    assert answers([1, 2]) == answers([1, 2]) != answers([1, 3])


def test_whether_an_answer_ended(model: Decoder, tokenizer: Tokenizer):
    rollouts = Rollouts(model, tokenizer, max_length=64, at_once=8)
    for rollout in rollouts.answer(_prompts(1), [0], group_size=8, max_tokens=MAX_TOKENS)[0]:
        assert rollout.ended == (rollout.token_ids[-1] == tokenizer.eos_id)
        assert rollout.ended or len(rollout.token_ids) == MAX_TOKENS
    assert rollouts.best_answers(_prompts(2), max_tokens=4) == rollouts.best_answers(_prompts(2), max_tokens=4)


def test_a_model_gone_wrong_is_one_line(model: Decoder, tokenizer: Tokenizer):
    with torch.no_grad():
        model.head_weight.fill_(float("nan"))
    with pytest.raises(UserError, match="logits are not finite"):
        Rollouts(model, tokenizer, max_length=64, at_once=8).answer(_prompts(1), [0], group_size=2, max_tokens=4)
