"""The answers, in the shapes that the `openai` client reads. Only fields that were set are written (`exclude_unset`).

Whole answers and chunks differ in `message` and `delta` alone; both are built from the same pieces.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

FinishReason = Literal["stop", "length", "tool_calls"]


class PromptTokensDetails(BaseModel):
    """cached_tokens: tokens of the prompts whose latents were still there."""

    cached_tokens: int


class Usage(BaseModel):
    """Tokens of all prompts and all answers of one request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TokenExtras(BaseModel):
    """Per token of one answer. drafted: whether MTP had guessed it. experts: per MoE layer, those that answered."""

    token_ids: list[int] = []
    tokens: list[str] = []
    drafted: list[bool] = []
    experts: list[list[list[int]]] | None = None


class Extras(TokenExtras):
    """Chunks carry a choice's tokens; the last one, and a whole answer, how the request went.

    acceptance: the share of drafted tokens that were right; None where nothing was drafted.
    """

    acceptance: float | None = None
    tokens_per_s: float | None = None


class CompletionLogprobs(BaseModel):
    """One entry a token. The first token of an echoed prompt has no probability: null."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None
    stop_reason: int | str | None = None
    fireflyer: TokenExtras | None = None


class Completion(BaseModel):
    """A plain completion, or a chunk of one."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None
    fireflyer: Extras | None = None


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]


class FunctionDelta(BaseModel):
    name: str | None = None
    arguments: str


class ToolCallDelta(BaseModel):
    """In a message without `index`: there the place in the list is it."""

    index: int | None = None
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta


class Delta(BaseModel):
    """A message, or what is new of it."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChoice(BaseModel):
    index: int
    message: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    fireflyer: TokenExtras | None = None


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    fireflyer: Extras | None = None


class ChatChunkChoice(BaseModel):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


class ChatCompletionChunk(BaseModel):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    fireflyer: Extras | None = None


class ModelExtras(BaseModel):
    """What the page wants to know. num_experts: in each MoE layer; max_output_tokens: of one answer; null: no limit."""

    taught_to_chat: bool
    num_experts: int
    max_output_tokens: int | None


class ModelCard(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: Literal["fireflyer"]
    max_model_len: int
    fireflyer: ModelExtras


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelCard]


class Tokens(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]


class Text(BaseModel):
    prompt: str


class TokenizerInfo(BaseModel):
    bos_token: str
    eos_token: str
    pad_token: str | None
    chat_template: str | None
