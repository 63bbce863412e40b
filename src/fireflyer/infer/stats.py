"""What an engine counts of itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class EngineStats:
    """Counts since the engine's start, and how things stand. Seconds are wall time.

    blocks_cached: blocks that no answer uses, but whose tokens can be found by those that begin the same way.
    prefix_hit_tokens: of `prompt_tokens`, those that were not computed.
    model_s: of `step_s`, what the decoder took, its head and its MTP layers included; the rest is Python's.
    """

    steps: int = 0
    running: int = 0
    waiting: int = 0
    blocks_total: int = 0
    blocks_used: int = 0
    blocks_cached: int = 0
    prompt_tokens: int = 0
    prefix_hit_tokens: int = 0
    generated_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    preemptions: int = 0
    step_s: float = 0.0
    model_s: float = 0.0
