"""From the fields of a request to the engine's SamplingParams."""

from __future__ import annotations

from fireflyer.infer.sampling_params import SamplingParams
from fireflyer.serve.errors import ApiError
from fireflyer.serve.protocol import GenerationRequest
from fireflyer.serve.settings import ServeSettings


def sampling_params(
    body: GenerationRequest,
    settings: ServeSettings,
    *,
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None = None,
    response_format: dict | None = None,
) -> SamplingParams:
    """What the engine is asked for. `response_format` replaces the request's own. Raises UserError, ApiError."""
    if body.n > settings.max_n:
        raise ApiError(400, f"n is {body.n}; this server gives {settings.max_n} answers at most", param="n")
    limit = settings.max_output_tokens
    if limit is not None and max_tokens is not None and max_tokens > limit:
        message = f"max_tokens is {max_tokens}; this server writes {limit} at most (--max-output-tokens)"
        raise ApiError(400, message, param="max_tokens", code="max_tokens_too_large")
    return SamplingParams(
        n=body.n,
        max_tokens=limit if max_tokens is None else max_tokens,
        min_tokens=body.min_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        min_p=body.min_p,
        presence_penalty=body.presence_penalty,
        frequency_penalty=body.frequency_penalty,
        repetition_penalty=body.repetition_penalty,
        logit_bias=_token_biases(body.logit_bias),
        seed=body.seed,
        stop=body.stop,
        stop_token_ids=body.stop_token_ids,
        include_stop_str_in_output=body.include_stop_str_in_output,
        ignore_eos=body.ignore_eos,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        response_format=response_format or body.response_format,
    )


def _token_biases(by_text: dict[str, float]) -> dict[int, float] | None:
    """JSON's keys are texts: "50256" is a token id. Raises ApiError."""
    for key in by_text:
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            raise ApiError(400, f"logit_bias has the key {key[:40]!r}; it must be a token id", param="logit_bias")
    return {int(key): value for key, value in by_text.items()} or None
