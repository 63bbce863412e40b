"""Fireflyer: DeepSeek-V3 end to end. The public names load on first use, so that importing the package stays light."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "ModelConfig": "fireflyer.config",
    "UserError": "fireflyer.errors",
    "load_model": "fireflyer.checkpoint.hf",
    "save_model": "fireflyer.checkpoint.hf",
    "LLM": "fireflyer.infer.llm",
    "SamplingParams": "fireflyer.infer.sampling_params",
}

__all__ = ["LLM", "ModelConfig", "SamplingParams", "UserError", "__version__", "load_model", "save_model"]

if TYPE_CHECKING:
    from fireflyer.checkpoint.hf import load_model, save_model
    from fireflyer.config import ModelConfig
    from fireflyer.errors import UserError
    from fireflyer.infer.llm import LLM
    from fireflyer.infer.sampling_params import SamplingParams


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'fireflyer' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
