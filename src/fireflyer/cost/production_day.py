"""DeepSeek's published day of serving V3 and R1, 27 to 28 February 2025: cost and what it would have earned.

deepseek-ai/open-infra-index, day 6 (56d8685). The money follows from the inputs here; tests and `make proof` check it.
"""

from __future__ import annotations

MEAN_NODES = 226.75
GPUS_PER_NODE = 8
USD_PER_GPU_HOUR = 2.0
INPUT_TOKENS = 608e9
CACHED_INPUT_TOKENS = 342e9
OUTPUT_TOKENS = 168e9
USD_PER_MILLION_CACHED = 0.14
USD_PER_MILLION_INPUT = 0.55
USD_PER_MILLION_OUTPUT = 2.19
PUBLISHED_REVENUE_USD = 562_027
"""From the day's unrounded token counts, which were not published; the rounded ones above give $562,100."""

INPUT_TOKENS_PER_S_PER_NODE = 73_700
OUTPUT_TOKENS_PER_S_PER_NODE = 14_800
MEAN_CACHE_TOKENS = 4_989


def cost_usd() -> float:
    """Rent of the mean number of nodes for a day: $87,072."""
    return MEAN_NODES * GPUS_PER_NODE * 24 * USD_PER_GPU_HOUR


def revenue_usd() -> float:
    """All tokens at R1's prices."""
    fresh = INPUT_TOKENS - CACHED_INPUT_TOKENS
    usd_times_million = (
        CACHED_INPUT_TOKENS * USD_PER_MILLION_CACHED
        + fresh * USD_PER_MILLION_INPUT
        + OUTPUT_TOKENS * USD_PER_MILLION_OUTPUT
    )
    return usd_times_million / 1e6


def margin(revenue: float) -> float:
    """Profit over cost: 5.45 from the published revenue, 545%."""
    return (revenue - cost_usd()) / cost_usd()
