"""Rollouts: prompts in, groups of answers out, sampled by the engine around the model in training.

An answer's token ids are those the engine drew; they are trained on as they are and never encoded again from text,
which could give others. Beside them stand the log-probabilities the engine drew them with: the old policy's. Answers
are drawn at temperature 1 with no filter, so that these are the policy's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fireflyer.errors import Stopped, UserError
from fireflyer.infer.llm import LLM
from fireflyer.infer.options import EngineOptions
from fireflyer.infer.request import Request
from fireflyer.infer.sampling_params import SamplingParams
from fireflyer.model.decoder import Decoder
from fireflyer.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Rollout:
    """One answer. `ended` by its end token, and not for want of room.

    logprobs: of each token, by the weights that drew it.
    experts: for each token and MoE layer of the main model, the experts of the row that gave it; None if not asked for.
    """

    token_ids: list[int]
    logprobs: list[float]
    text: str
    ended: bool
    experts: list[list[list[int]]] | None


class Rollouts:
    """The engine of a training run. It reads the weights as they are at each call.

    Args:
        max_length: tokens of prompt and answer together.
        at_once: answers that are written at the same time.
        record_experts: whether to keep which experts answered.
    """

    def __init__(
        self, model: Decoder, tokenizer: Tokenizer, *, max_length: int, at_once: int, record_experts: bool = False
    ) -> None:
        # Drafts would be verified in spans of two rows each: at these batch sizes they cost more than they save, and
        # the MTP modules are not trained along.
        options = EngineOptions(max_length=max_length, max_num_seqs=at_once, num_speculative_tokens=0)
        self._llm = LLM.from_model(model, tokenizer, options=options)
        self._record_experts = record_experts

    def answer(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], *, group_size: int, max_tokens: int
    ) -> list[list[Rollout]]:
        """`group_size` answers to each prompt; the latents of a prompt are shared among them.

        Args:
            prompts: token ids.
            seeds: one for each prompt; the same seed and weights give the same answers.

        Raises UserError where the model's logits are not finite.
        """
        return [
            [_rollout(request, index) for index in range(group_size)]
            for request in self._run(prompts, seeds, SamplingParams(n=group_size, max_tokens=max_tokens, logprobs=0))
        ]

    def best_answers(self, prompts: Sequence[Sequence[int]], *, max_tokens: int) -> list[Rollout]:
        """The greedy answer to each prompt."""
        params = SamplingParams(temperature=0, max_tokens=max_tokens, logprobs=0)
        return [_rollout(request, 0) for request in self._run(prompts, [0] * len(prompts), params)]

    def _run(self, prompts: Sequence[Sequence[int]], seeds: Sequence[int], params: SamplingParams) -> list[Request]:
        llm = self._llm
        requests = [
            llm.make_request(list(prompt), _seeded(params, seed), report_experts=self._record_experts)
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        finish(llm, requests)
        return requests


def finish(llm: LLM, requests: Sequence[Request], should_stop: Callable[[], bool] = lambda: False) -> None:
    """Answer all requests, from no cached prefix. Raises UserError where the model's logits are not finite.

    should_stop: asked after every step; once true, the requests are given up and Stopped is raised.
    """
    with llm.lock:
        llm.engine.forget_prefixes()  # they may be of other weights; and what is cached decides the last bits
        for request in requests:
            llm.engine.add(request)
        while not all(request.finished for request in requests):
            llm.engine.step()
            if should_stop():
                for request in requests:
                    llm.engine.abort(request.request_id)
                raise Stopped
    failed = [answer for request in requests for answer in request.answers if answer.finish_reason == "error"]
    if failed:
        raise UserError(f"rollouts: {failed[0].error}")


def _seeded(params: SamplingParams, seed: int) -> SamplingParams:
    return SamplingParams(
        n=params.n,
        max_tokens=params.max_tokens,
        temperature=params.temperature,
        logprobs=params.logprobs,
        seed=seed,
    )


def _rollout(request: Request, index: int) -> Rollout:
    answer, output = request.answers[index], request.answers[index].output()
    logprobs = [entry[token].logprob for token, entry in zip(output.token_ids, output.logprobs or [], strict=True)]
    return Rollout(
        output.token_ids,
        logprobs,
        output.text,
        output.finish_reason == "stop",
        answer.experts if request.report_experts else None,
    )
