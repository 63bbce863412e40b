"""The bodies of requests, as the `openai` client sends them. In: JSON. Out: checked objects.

A field that we don't know is refused, as OpenAI's servers do: it might have changed the answer. Fields that change
nothing here (who asks, how it is billed, what to store) are accepted. null means the default. Beyond OpenAI's own
fields there are those that vLLM's users know, and `fireflyer`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic.config import JsonDict

MAX_STOPS = 32
MAX_STOP_LENGTH = 256
MAX_TOP_LOGPROBS = 20

StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class _Body(BaseModel):
    """Exact JSON types: "3" is no number. A null is as good as leaving the field out."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        return {key: value for key, value in data.items() if value is not None} if isinstance(data, dict) else data


class StreamOptions(_Body):
    """What a stream carries beside the answer."""

    include_usage: bool = False
    include_obfuscation: bool = False  # padding against guessing tokens from sizes, which OpenAI's servers may add


class FireflyerOptions(_Body):
    """Our own: per token, whether MTP had guessed it and, if asked for, which experts answered."""

    experts: bool = False


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class GenerationRequest(_Body):
    """What chat and plain completions share."""

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=1024)] = 1
    stream: bool = False
    stream_options: StreamOptions | None = None

    temperature: Annotated[float, Field(ge=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    logit_bias: Annotated[dict[str, float], Field(max_length=1024)] = {}
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[list[StopString], BeforeValidator(_listed), Field(max_length=MAX_STOPS)] = []
    stop_token_ids: Annotated[list[TokenId], Field(max_length=1024)] = []
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: Annotated[int, Field(ge=0)] = 0
    response_format: dict[str, Any] | None = None
    cache_salt: Annotated[str, Field(max_length=256)] = ""
    fireflyer: FireflyerOptions | None = None

    # Accepted, and of no consequence here.
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    prompt_cache_options: Any = None

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


def _checked_prompts(value: Any) -> Any:
    prompts = value if isinstance(value, list) else [value]
    if value and isinstance(value, list) and all(_is_token(item) for item in value):
        return value
    for prompt in prompts:
        tokens = isinstance(prompt, list) and prompt and all(_is_token(item) for item in prompt)
        if not isinstance(prompt, str) and not tokens:
            raise ValueError("prompt must be a text, a list of token ids (0 or more), or a list of these, none empty")
    if not prompts:
        raise ValueError("prompt is an empty list; give at least one text or token id")
    return value


def _is_token(item: object) -> bool:
    return isinstance(item, int) and not isinstance(item, bool) and 0 <= item < 2**31


_PROMPT_SCHEMA: JsonDict = {
    "anyOf": [
        {"type": "string"},
        {"type": "array", "minItems": 1, "items": {"type": "string"}},
        {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}},
        {
            "type": "array",
            "minItems": 1,
            "items": {"type": "array", "minItems": 1, "items": {"type": "integer", "minimum": 0}},
        },
    ]
}


class CompletionRequest(GenerationRequest):
    """POST /v1/completions."""

    prompt: Annotated[Any, AfterValidator(_checked_prompts), Field(json_schema_extra=_PROMPT_SCHEMA)]
    suffix: str | None = None
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] = 16

    @model_validator(mode="after")
    def _fits_together(self) -> CompletionRequest:
        if self.suffix is not None and self.echo:
            raise ValueError("suffix and echo don't go together: the prompt does not come before the answer")
        if self.n > 1 and self.echo and self.logprobs is not None:
            raise ValueError("echo with logprobs scores the prompt once; leave n at 1")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """One prompt or many, as a list."""
        prompt: Any = self.prompt
        return [prompt] if isinstance(prompt, str) or _is_token(prompt[0]) else prompt


class FunctionCall(BaseModel):
    """A call that the assistant made. `arguments` is JSON as text."""

    model_config = ConfigDict(extra="ignore", strict=True)

    name: str
    arguments: str = "{}"


class ToolCall(BaseModel):
    """A call in a past message of the assistant."""

    model_config = ConfigDict(extra="ignore", strict=True)

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(BaseModel):
    """One message of the conversation. What other servers add to theirs (annotations, audio) is passed over."""

    model_config = ConfigDict(extra="ignore", strict=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None


class Function(BaseModel):
    """What a tool is called and takes. Templates show it as it came, so everything is kept."""

    model_config = ConfigDict(extra="allow", strict=True)

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(BaseModel):
    """A function that the model may call."""

    model_config = ConfigDict(extra="allow", strict=True)

    type: Literal["function"]
    function: Function


class _NamedFunction(_Body):
    name: str


class NamedTool(_Body):
    """tool_choice: this one and no other."""

    type: Literal["function"]
    function: _NamedFunction


class ChatCompletionRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] = 0
    tools: Annotated[list[Tool], Field(max_length=128)] = []
    tool_choice: Literal["none", "auto", "required"] | NamedTool = "auto"
    parallel_tool_calls: bool = True
    chat_template_kwargs: dict[str, Any] = {}
    add_generation_prompt: bool = True
    continue_final_message: bool = False

    # Only these values ask for what is done here anyhow.
    modalities: list[Literal["text"]] = ["text"]
    verbosity: Literal["medium"] = "medium"
    # A guess at the answer, which may make it come sooner and never changes it.
    prediction: Any = None

    @model_validator(mode="after")
    def _fits_together(self) -> ChatCompletionRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true")
        if self.max_tokens and self.max_completion_tokens and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens and max_completion_tokens differ; give one of them")
        if self.continue_final_message:
            if "add_generation_prompt" in self.model_fields_set and self.add_generation_prompt:
                raise ValueError("continue_final_message and add_generation_prompt can't both be true")
            if self.messages[-1].role != "assistant":
                raise ValueError("continue_final_message needs the last message to be the assistant's")
        names = [tool.function.name for tool in self.tools]
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise ValueError(f"tool_choice names {self.tool_choice.function.name!r}; the tools are {names}")
        if self.tool_choice == "required" and not names:
            raise ValueError("tool_choice is required, but there are no tools")
        if len(set(names)) < len(names):
            raise ValueError(f"two tools have the same name: {sorted(names)}")
        return self


class TokenizeRequest(_Body):
    """POST /tokenize: a text, as a prompt is read."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool = True


class DetokenizeRequest(_Body):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[TokenId]
