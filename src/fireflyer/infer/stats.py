"""What an engine counts of itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class EngineStats:
    """Counts since the engine's start, and how things stand. Seconds are wall time.

    blocks_cached: blocks that no answer uses, but whose tokens can be found by those that begin the same way.
    prefix_hit_tokens: of `prompt_tokens`, those that were not computed.
    expert_hits, expert_misses: uses of a routed expert that was in memory, and that was read for it; of the model, so
        several engines on one count together. Both 0 where all experts are in memory.
    expert_bytes: of the experts that are in memory now.
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
    expert_hits: int = 0
    expert_misses: int = 0
    expert_bytes: int = 0
