"""`fireflyer chat CHECKPOINT`: a conversation in the terminal, or read line by line from a pipe.

Answers go to stdout as they are written, in whole characters; everything else goes to stderr.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from fireflyer.cli.sampling import add_sampling_arguments, sampling_params
from fireflyer.errors import UserError

if TYPE_CHECKING:
    from fireflyer.infer.llm import LLM
    from fireflyer.infer.sampling_params import SamplingParams
    from fireflyer.text.tokenizer import Tokenizer

_COMMANDS = "/reset forgets the conversation, /quit or Ctrl-D leaves, Ctrl-C stops an answer"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "chat",
        help="talk with a checkpoint in the terminal",
        description=f"Talk with a checkpoint in the terminal, or pipe one message a line. {_COMMANDS}.",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint or run folder")
    parser.add_argument("--system", metavar="TEXT", help="a system message to begin with")
    # Temperature and top-p as DeepSeek recommends them for R1.
    add_sampling_arguments(parser, max_tokens=1024, temperature=0.6, top_p=0.95)


def run(args: argparse.Namespace) -> int:
    """Talk until the input ends."""
    params = sampling_params(args, [])
    from fireflyer.infer.llm import LLM

    llm = LLM(
        args.checkpoint,
        device=args.device,
        quantization=args.quantization,
        expert_memory=args.expert_memory,
        adapter=args.adapter,
    )
    if llm.tokenizer is None:
        raise UserError(f"{args.checkpoint} has no tokenizer.json, without which no text can be read; put it there")
    note = untaught(llm.tokenizer)
    if note:
        _say(note)
    if sys.stdin.isatty():
        _say(_COMMANDS)
    conversation = Conversation(llm, params, args.system)
    for line in _lines():
        text = line.strip()
        if text == "/quit":
            break
        if text == "/reset":
            conversation.reset()
            _say("forgotten")
        elif text[:1] == "/" and text[1:].isalpha():
            _say(f"unknown command {text}; {_COMMANDS}")
        elif text:
            conversation.answer(text)
    return 0


def untaught(tokenizer: Tokenizer) -> str | None:
    """What to tell the user of a model that was never taught to chat, or None.

    Every tokenizer trained here ships the template that post-training will use, so having it proves nothing; the mark
    that post-training leaves does, and so does a template of the checkpoint's own makers.
    """
    from fireflyer.text.templates import CHAT_TEMPLATE

    if tokenizer.taught_chat or tokenizer.chat_template not in (None, CHAT_TEMPLATE):
        return None
    return "this model was only pretrained, never taught to chat: it goes on with your text rather than answers it"


class Conversation:
    """The messages so far, and a model to answer the next."""

    def __init__(self, llm: LLM, params: SamplingParams, system: str | None) -> None:
        self._llm = llm
        self._plain = llm.tokenizer is not None and llm.tokenizer.chat_template is None
        self._params = replace(params, stop=["\n\nUser:"]) if self._plain else params
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self.reset()

    def reset(self) -> None:
        """Forget all but the system message."""
        self.messages = list(self._system)

    def answer(self, text: str) -> None:
        """Print the answer to `text` as it grows. What Ctrl-C cuts off counts as said; what fails is not kept."""
        messages = [*self.messages, {"role": "user", "content": text}]
        written: list[str] = []
        cut = None
        try:
            for part in self._llm.stream_sync(self._encode(messages), self._params):
                if part.error is not None:
                    raise UserError(part.error)
                written.append(part.text)
                print(part.text, end="", flush=True)
                if part.finish_reason == "length":
                    cut = f"cut at {self._params.max_tokens} tokens (--max-tokens) or at the end of the context"
        except KeyboardInterrupt:
            cut = "stopped"
        except UserError as error:
            _say(f"{error}; /reset forgets the conversation")
            return
        print(flush=True)
        if cut:
            _say(cut)
        self.messages = [*messages, {"role": "assistant", "content": "".join(written)}]

    def _encode(self, messages: list[dict[str, str]]) -> list[int]:
        """Token ids of the conversation; in DeepSeek-V2's plain-text form where there is no template."""
        if not self._plain:
            return self._llm.encode_chat(messages)
        said = "".join(f"{message['role'].capitalize()}: {message['content']}\n\n" for message in messages)
        return self._llm.encode_prompt(said + "Assistant:")


def _lines() -> Iterator[str]:
    """What the user types, or the lines of a pipe. Raises UserError."""
    if not sys.stdin.isatty():
        try:
            yield from sys.stdin
        except UnicodeDecodeError as error:
            raise UserError(f"stdin: invalid UTF-8 ({error.reason}); convert the messages first") from None
        return
    with suppress(ImportError):  # Windows has none
        import readline  # noqa: F401  (importing it gives input() its editing keys)
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            _say(_COMMANDS)
        except UnicodeDecodeError:
            _say("that was no UTF-8")


def _say(text: str) -> None:
    print(f"[{text}]", file=sys.stderr, flush=True)
