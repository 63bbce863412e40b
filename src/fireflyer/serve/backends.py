"""Serving beyond one machine is vLLM's and SGLang's: their commands for a checkpoint of DeepSeek's kind.

In: what `serve` was asked for, and the checkpoint's config. Out: the command's words and environment. Both answer
OpenAI's API on /v1, with the names that clients use here. No torch, and neither of the two is imported.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fireflyer.config import ModelConfig
from fireflyer.errors import UserError


@dataclass(frozen=True)
class BackendOptions:
    """checkpoint: a folder in the published format. tensor_parallel: GPUs that share each layer; expert_parallel: that
    they hold whole experts instead of slices of all. num_speculative_tokens: drafts of the MTP layers; None: one where
    the checkpoint has any."""

    checkpoint: Path
    host: str
    port: int
    served_model_name: str
    api_key: str | None = None
    tensor_parallel: int = 1
    expert_parallel: bool = False
    max_length: int | None = None
    max_num_seqs: int | None = None
    num_speculative_tokens: int | None = None


@dataclass(frozen=True)
class Command:
    """words[0] is the program's path; environment: what is added to ours."""

    words: list[str]
    environment: dict[str, str]


def vllm_command(program: str, options: BackendOptions, config: ModelConfig) -> Command:
    """`vllm serve`. The key goes by the environment, where other users don't see it."""
    words = [program, "serve", str(options.checkpoint)]
    words += ["--host", options.host, "--port", str(options.port), "--served-model-name", options.served_model_name]
    words += ["--tensor-parallel-size", str(options.tensor_parallel)]
    if options.expert_parallel:
        words.append("--enable-expert-parallel")
    if options.max_length is not None:
        words += ["--max-model-len", str(options.max_length)]
    if options.max_num_seqs is not None:
        words += ["--max-num-seqs", str(options.max_num_seqs)]
    if drafts := _drafts(options, config):
        speculation = {"method": "deepseek_mtp", "num_speculative_tokens": drafts}
        words += ["--speculative-config", json.dumps(speculation)]
    return Command(words, {} if options.api_key is None else {"VLLM_API_KEY": options.api_key})


def sglang_command(program: str, options: BackendOptions, config: ModelConfig) -> Command:
    """`sglang serve`, whose own MTP drafting is called EAGLE. It takes the key as a word alone."""
    words = [program, "serve", "--model-path", str(options.checkpoint)]
    words += ["--host", options.host, "--port", str(options.port), "--served-model-name", options.served_model_name]
    words += ["--tp-size", str(options.tensor_parallel)]
    if options.expert_parallel:
        words += ["--ep-size", str(options.tensor_parallel)]
    if options.max_length is not None:
        words += ["--context-length", str(options.max_length)]
    if options.max_num_seqs is not None:
        words += ["--max-running-requests", str(options.max_num_seqs)]
    if drafts := _drafts(options, config):
        words += ["--speculative-algorithm", "EAGLE", "--speculative-num-steps", str(drafts)]
        words += ["--speculative-eagle-topk", "1", "--speculative-num-draft-tokens", str(drafts + 1)]
    if options.api_key is not None:
        words += ["--api-key", options.api_key]
    return Command(words, {})


BACKENDS: dict[str, Callable[[str, BackendOptions, ModelConfig], Command]] = {
    "vllm": vllm_command,
    "sglang": sglang_command,
}


def backend_command(backend: str, options: BackendOptions, config: ModelConfig) -> Command:
    """The command of one of `BACKENDS`, its program found. Raises UserError."""
    if options.tensor_parallel < 1:
        raise UserError(f"--tensor-parallel {options.tensor_parallel}: give the number of GPUs, 1 at least")
    if config.num_attention_heads % options.tensor_parallel:
        raise UserError(
            f"--tensor-parallel {options.tensor_parallel} doesn't divide the model's {config.num_attention_heads}"
            " attention heads; give a number that does"
        )
    if options.expert_parallel and not config.n_routed_experts:
        raise UserError("--expert-parallel: the model has no routed experts; leave it out")
    if options.num_speculative_tokens and not config.num_nextn_predict_layers:
        raise UserError(
            f"--num-speculative-tokens {options.num_speculative_tokens}: the checkpoint has no MTP layers to draft"
            " with; leave it out"
        )
    folders = [str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]
    program = shutil.which(backend, path=os.pathsep.join(folders))
    if program is None:
        raise UserError(
            f"--backend {backend}: no {backend} on this machine; type: pip install {backend} (in an environment of its"
            " own, as it brings its own torch), and have that environment's bin on PATH"
        )
    return BACKENDS[backend](program, options, config)


def _drafts(options: BackendOptions, config: ModelConfig) -> int:
    if options.num_speculative_tokens is not None:
        return options.num_speculative_tokens
    return min(1, config.num_nextn_predict_layers)
