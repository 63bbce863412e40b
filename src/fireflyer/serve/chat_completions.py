"""/v1/chat/completions. In: a ChatCompletionRequest. Out: one object, or chunks.

Both come from the same pieces: a whole answer is what its chunks add up to. The dialect's parser tells thinking, answer
and calls apart, and holds text back until it is sure.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from fireflyer.infer.outputs import StreamPart
from fireflyer.serve.conversation import Conversation, read_conversation
from fireflyer.serve.generation import Generation, Totals, add_extras, token_extras
from fireflyer.serve.logprobs import chat_logprobs
from fireflyer.serve.protocol import ChatCompletionRequest
from fireflyer.serve.responses import (
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    Delta,
    Extras,
    FunctionDelta,
    TokenExtras,
    ToolCallDelta,
    Usage,
)
from fireflyer.serve.sampling import sampling_params
from fireflyer.serve.service import Service, in_thread
from fireflyer.text import parsers

_Piece = tuple[ChatChunkChoice, TokenExtras | None]


class ChatAnswer:
    """The answer to one request: iterate `chunks`, or await `whole`. Both raise ApiError and UserError."""

    def __init__(self, service: Service, body: ChatCompletionRequest) -> None:
        self._service, self._body = service, body
        self._id, self._created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())

    async def chunks(self) -> AsyncGenerator[ChatCompletionChunk, None]:
        """Piece by piece; at the end the usage and how it went, if asked for."""
        async with aclosing(self._pieces()) as pieces:
            async for piece in pieces:
                if isinstance(piece, Totals):
                    usage = piece.usage if self._body.include_usage else None
                    if usage or self._body.fireflyer:
                        yield self._chunk([], usage, piece.extras)
                else:
                    choice, extras = piece
                    yield self._chunk([choice], None, extras and Extras(**dict(extras)))

    async def whole(self) -> ChatCompletion:
        """All at once."""
        choices: dict[int, ChatChoice] = {}
        async with aclosing(self._pieces()) as pieces:
            async for piece in pieces:
                if isinstance(piece, Totals):
                    completion = ChatCompletion(
                        id=self._id,
                        object="chat.completion",
                        created=self._created,
                        model=self._service.settings.served_model_name,
                        choices=[choices[index] for index in sorted(choices)],
                        usage=piece.usage,
                    )
                    if self._body.fireflyer is not None:
                        completion.fireflyer = piece.extras
                    return completion
                chunk, extras = piece
                if chunk.index not in choices:
                    choices[chunk.index] = _empty(chunk.index)
                _extend(choices[chunk.index], chunk, extras)
        raise AssertionError("pieces end with the totals")

    async def _pieces(self) -> AsyncGenerator[_Piece | Totals, None]:
        service, body = self._service, self._body
        conversation = await in_thread(read_conversation, service, body)
        params = sampling_params(
            body,
            service.settings,
            max_tokens=body.max_completion_tokens or body.max_tokens,
            logprobs=body.top_logprobs if body.logprobs else None,
            response_format=conversation.response_format,
        )
        choices = [_Choice(service, body, conversation, index) for index in range(body.n)]
        generation = Generation(service, body, [conversation.prompt], params)
        async with generation:
            for choice in choices:
                yield choice.opening(), None
            async for index, part in generation.parts():
                piece = choices[index].push(part)
                if piece is not None:
                    yield piece
        yield generation.totals()

    def _chunk(self, choices: list[ChatChunkChoice], usage: Usage | None, extras: Extras | None) -> ChatCompletionChunk:
        chunk = ChatCompletionChunk(
            id=self._id,
            object="chat.completion.chunk",
            created=self._created,
            model=self._service.settings.served_model_name,
            choices=choices,
        )
        if self._body.include_usage:
            chunk.usage = usage
        if extras is not None and self._body.fireflyer is not None:
            chunk.fireflyer = extras
        return chunk


class _Choice:
    """One answer while it grows."""

    def __init__(self, service: Service, body: ChatCompletionRequest, conversation: Conversation, index: int) -> None:
        self._service, self._body, self._index = service, body, index
        self._parser = conversation.parser()
        self._one_call = not body.parallel_tool_calls

    def opening(self) -> ChatChunkChoice:
        """Who speaks, before the first token is there."""
        delta = Delta(role="assistant", content="")
        return ChatChunkChoice(index=self._index, delta=delta, logprobs=None, finish_reason=None)

    def push(self, part: StreamPart) -> _Piece | None:
        """What a part of the engine adds; None for nothing that a client could use."""
        deltas = self._parser.push(part.text)
        if part.finish_reason is not None:
            deltas += self._parser.finish()
        delta = self._delta(deltas)
        reports = bool(part.token_ids) and (self._body.logprobs or self._body.fireflyer is not None)
        if not delta.model_fields_set and part.finish_reason is None and not reports:
            return None
        choice = ChatChunkChoice(index=self._index, delta=delta, logprobs=None, finish_reason=None)
        tokenizer = self._service.tokenizer
        if self._body.logprobs and tokenizer is not None:
            choice.logprobs = chat_logprobs(tokenizer, part.logprobs or [], self._body.top_logprobs)
        if part.finish_reason == "stop" or part.finish_reason == "length":
            called = part.finish_reason == "stop" and self._parser.num_tool_calls > 0
            choice.finish_reason = "tool_calls" if called else part.finish_reason
            choice.stop_reason = part.stop_reason
        return choice, token_extras(tokenizer, part) if self._body.fireflyer is not None else None

    def _delta(self, deltas: Sequence[parsers.Delta]) -> Delta:
        """All that one part decided, in one delta."""
        delta = Delta()
        for each in deltas:
            if isinstance(each, parsers.ReasoningDelta):
                delta.reasoning_content = (delta.reasoning_content or "") + each.text
            elif isinstance(each, parsers.ContentDelta):
                delta.content = (delta.content or "") + each.text
            elif not (self._one_call and each.index > 0):
                delta.tool_calls = delta.tool_calls or []
                _add_call(delta.tool_calls, each)
        return delta


def _add_call(calls: list[ToolCallDelta], delta: parsers.ToolCallStart | parsers.ToolCallArguments) -> None:
    if isinstance(delta, parsers.ToolCallStart):
        function = FunctionDelta(name=delta.name, arguments="")
        calls.append(ToolCallDelta(index=delta.index, id=delta.id, type="function", function=function))
    elif calls and calls[-1].index == delta.index:
        calls[-1].function.arguments += delta.text
    else:
        calls.append(ToolCallDelta(index=delta.index, function=FunctionDelta(arguments=delta.text)))


def _empty(index: int) -> ChatChoice:
    message = Delta(role="assistant", content="")
    return ChatChoice(index=index, message=message, logprobs=None, finish_reason=None)


def _extend(whole: ChatChoice, piece: ChatChunkChoice, extras: TokenExtras | None) -> None:
    """Append a piece of the same choice."""
    message, delta = whole.message, piece.delta
    message.content = (message.content or "") + (delta.content or "")
    if delta.reasoning_content:
        message.reasoning_content = (message.reasoning_content or "") + delta.reasoning_content
    for call in delta.tool_calls or ():
        message.tool_calls = message.tool_calls or []
        if call.id is not None:
            message.tool_calls.append(ToolCallDelta(id=call.id, type="function", function=call.function))
        else:
            message.tool_calls[-1].function.arguments += call.function.arguments
    if piece.logprobs is not None:
        if whole.logprobs is None:
            whole.logprobs = piece.logprobs
        else:
            whole.logprobs.content += piece.logprobs.content
    if whole.fireflyer is None:
        if extras is not None:
            whole.fireflyer = extras
    else:
        add_extras(whole.fireflyer, extras)
    if piece.finish_reason is not None:
        whole.finish_reason, whole.stop_reason = piece.finish_reason, piece.stop_reason
        if message.tool_calls and not message.content:
            message.content = None
