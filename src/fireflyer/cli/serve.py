"""`fireflyer serve CHECKPOINT`: the OpenAI API on /v1 and a chat page on /, until Ctrl-C or SIGTERM."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from fireflyer.errors import UserError

if TYPE_CHECKING:
    from fireflyer.infer.llm import LLM
    from fireflyer.serve.settings import ServeSettings

_LOOPBACK = ("127.0.0.1", "localhost", "::1", "[::1]")
_MAX_NUM_SEQS = 64


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    parser = subparsers.add_parser(
        "serve",
        help="serve a checkpoint: the OpenAI API and a chat page",
        description="Serve a checkpoint: the OpenAI API on /v1, a chat page on /. Ctrl-C lets running answers finish.",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a checkpoint or run folder")
    _add_network_arguments(parser)
    _add_limit_arguments(parser)
    _add_engine_arguments(parser)
    _add_backend_arguments(parser)


def _add_network_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("network")
    group.add_argument("--host", default="127.0.0.1", help="0.0.0.0 is every network; default: %(default)s")
    group.add_argument("--port", type=int, default=8000, help="0 takes a free one; default: %(default)s")
    group.add_argument("--api-key", metavar="KEY", help="what /v1 asks for; default: FIREFLYER_API_KEY, or none")
    group.add_argument("--served-model-name", metavar="NAME", help="default: the folder's name")
    group.add_argument(
        "--allowed-host", action="append", default=[], metavar="NAME", help="answer to this Host header too"
    )
    group.add_argument(
        "--allow-origin", action="append", default=[], metavar="URL", help="let pages of this site read answers (CORS)"
    )


def _add_limit_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("limits")
    group.add_argument(
        "--max-queue", type=int, default=256, metavar="N", help="answers that may wait; default: %(default)s"
    )
    group.add_argument("--max-n", type=int, default=16, metavar="N", help="answers to one prompt; default: %(default)s")
    group.add_argument(
        "--max-output-tokens", type=int, metavar="N", help="in one answer; default: what the context leaves"
    )
    group.add_argument("--max-body-bytes", type=int, default=8 * 2**20, metavar="N", help="default: %(default)s")
    group.add_argument(
        "--request-timeout", type=float, default=3600, metavar="S", help="seconds for one request; default: %(default)s"
    )
    group.add_argument(
        "--step-timeout",
        type=float,
        default=120,
        metavar="S",
        help="/ready is 503 when no step has ended for so many seconds; default: %(default)s",
    )
    group.add_argument(
        "--drain",
        type=float,
        default=30,
        metavar="S",
        help="seconds for running answers at the end; default: %(default)s",
    )


def _add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("engine")
    group.add_argument("--deterministic", action="store_true", help="the same bits alone and in any crowd; slower")
    group.add_argument(
        "--quantization", choices=("int8", "int4"), help="pack the weights on the way in: less memory, faster answers"
    )
    group.add_argument(
        "--expert-memory",
        metavar="SIZE",
        help="memory for routed experts, as 8GiB; the others are read when needed; default: all in memory",
    )
    group.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    group.add_argument(
        "--max-length", type=int, metavar="N", help="prompt and answer together; default: the model's own"
    )
    group.add_argument("--max-num-seqs", type=int, metavar="N", help=f"at the same time; default: {_MAX_NUM_SEQS}")
    group.add_argument(
        "--max-step-tokens", type=int, default=2048, metavar="N", help="read in one step; default: %(default)s"
    )
    group.add_argument("--cache-gib", type=float, metavar="G", help="memory for the cache; default: what it may need")
    group.add_argument(
        "--cache-dtype", choices=("auto", "fp32", "bf16", "int8"), default="auto", help="default: %(default)s"
    )
    group.add_argument("--no-prefix-cache", action="store_true", help="read every prompt from its beginning")
    group.add_argument(
        "--num-speculative-tokens",
        type=int,
        metavar="N",
        help="drafts of the MTP layers; 0 is off; default: all layers",
    )


def _add_backend_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("beyond one machine")
    group.add_argument("--backend", choices=("vllm", "sglang"), help="have vLLM or SGLang serve it, on the same /v1")
    group.add_argument(
        "--tensor-parallel", type=int, default=1, metavar="N", help="GPUs that share each layer; default: %(default)s"
    )
    group.add_argument("--expert-parallel", action="store_true", help="they hold whole experts, not slices of all")


def run(args: argparse.Namespace) -> int:
    """Serve until a signal."""
    if args.backend is not None:
        return _hand_over(args)
    if args.tensor_parallel != 1 or args.expert_parallel:
        raise UserError("--tensor-parallel and --expert-parallel are for --backend vllm or sglang; leave them out")
    try:
        from fireflyer.serve.listening import listen
        from fireflyer.serve.server import serve
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("fireflyer"):
            raise
        raise UserError(f"{error.name} is missing, which serving needs; type: pip install 'fireflyer[serve]'") from None
    settings = _settings(args)
    with listen(args.host, args.port) as sock:
        from fireflyer.infer.async_engine import AsyncEngine
        from fireflyer.serve.app import create_app

        engine = AsyncEngine(_load(args))
        host = f"[{args.host}]" if ":" in args.host else args.host
        url = f"http://{host}:{sock.getsockname()[1]}"
        if settings.api_key is None and args.host not in _LOOPBACK:
            _say(f"warning: {args.host} can be reached from outside, and there is no key; set FIREFLYER_API_KEY")

        def started() -> None:
            _say(f"{settings.served_model_name} is served: API {url}/v1, page {url}/ ; Ctrl-C ends it")

        serve(create_app(engine, settings), engine, started, sock)
    return 0


_OURS_ALONE = {
    "allowed_host": [],
    "allow_origin": [],
    "max_queue": 256,
    "max_n": 16,
    "max_output_tokens": None,
    "max_body_bytes": 8 * 2**20,
    "request_timeout": 3600,
    "step_timeout": 120,
    "drain": 30,
    "deterministic": False,
    "quantization": None,
    "expert_memory": None,
    "device": "cpu",
    "cache_gib": None,
    "cache_dtype": "auto",
    "no_prefix_cache": False,
}
"""What another server wouldn't honour, with the values that ask for nothing."""


def _hand_over(args: argparse.Namespace) -> int:
    """Become the other server: the same process, so that signals and exit codes are its own. Raises UserError."""
    from fireflyer.checkpoint.published import open_checkpoint
    from fireflyer.serve.backends import BackendOptions, backend_command
    from fireflyer.serve.listening import listen

    for name, nothing in _OURS_ALONE.items():
        if getattr(args, name) != nothing:
            raise UserError(
                f"--{name.replace('_', '-')} is for fireflyer's own server, not for {args.backend}; leave it out"
            )
    checkpoint = open_checkpoint(args.checkpoint)
    if not (checkpoint.folder / "tokenizer.json").is_file():
        raise UserError(f"{checkpoint.folder}: no tokenizer.json in it, which {args.backend} reads; put it beside")
    options = BackendOptions(
        checkpoint=checkpoint.folder.resolve(),
        host=args.host,
        port=args.port,
        served_model_name=args.served_model_name or Path(args.checkpoint).resolve().name,
        api_key=args.api_key if args.api_key is not None else os.environ.get("FIREFLYER_API_KEY"),
        tensor_parallel=args.tensor_parallel,
        expert_parallel=args.expert_parallel,
        max_length=args.max_length,
        max_num_seqs=args.max_num_seqs,
        num_speculative_tokens=args.num_speculative_tokens,
    )
    command = backend_command(args.backend, options, checkpoint.config)
    if not args.port:
        raise UserError(f"--port 0: {args.backend} wants a port of its own; give one, as --port 8000")
    listen(args.host, args.port).close()
    _say(f"{options.served_model_name} is handed to {args.backend}: API http://{args.host}:{args.port}/v1")
    os.execve(command.words[0], command.words, {**os.environ, **command.environment})


def _settings(args: argparse.Namespace) -> ServeSettings:
    """Raises UserError."""
    from fireflyer.serve.settings import ServeSettings

    hosts = (*_LOOPBACK, *args.allowed_host) if args.host in _LOOPBACK else tuple(args.allowed_host)
    return ServeSettings(
        served_model_name=args.served_model_name or Path(args.checkpoint).resolve().name,
        api_key=args.api_key if args.api_key is not None else os.environ.get("FIREFLYER_API_KEY"),
        allowed_hosts=hosts,
        allowed_origins=tuple(args.allow_origin),
        max_queue=args.max_queue,
        max_body_bytes=args.max_body_bytes,
        max_n=args.max_n,
        max_output_tokens=args.max_output_tokens,
        request_timeout_s=args.request_timeout,
        step_timeout_s=args.step_timeout,
        drain_s=args.drain,
    )


def _load(args: argparse.Namespace) -> LLM:
    """Raises UserError."""
    from fireflyer.infer.llm import LLM

    return LLM(
        args.checkpoint,
        device=args.device,
        quantization=args.quantization,
        expert_memory=args.expert_memory,
        max_length=args.max_length,
        max_num_seqs=_MAX_NUM_SEQS if args.max_num_seqs is None else args.max_num_seqs,
        max_step_tokens=args.max_step_tokens,
        cache_gib=args.cache_gib,
        cache_dtype=args.cache_dtype,
        prefix_cache=not args.no_prefix_cache,
        num_speculative_tokens=args.num_speculative_tokens,
        deterministic=args.deterministic,
    )


def _say(text: str) -> None:
    print(f"[{text}]", file=sys.stderr, flush=True)
