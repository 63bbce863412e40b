"""Everything that was tried before the shipped recipe was fixed, all of it on sessions before 2022-01.

A test of a strategy must know how many others it was chosen from: the deflated Sharpe ratio takes `NUM_TRIALS`. Each
model learned from one part of the A-share panel's 2020-03 to 2021-12 and was judged by its mean daily RankIC over
five-session returns on another: "late" is 2021-07 to 2021-12 after learning from what came before it, "early" the
reverse, 2020-05 to 2020-11 by what was learned from 2021, for a second opinion. First sketches had other spans.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Trial:
    """what: the settings tried. rank_ic: by span; for decoders of the signal where it was looked at, else of the
    five-session score."""

    model: str
    what: str
    rank_ic: dict[str, float]


TRIALS = (
    Trial("Ridge", "alpha 10", {"late": 0.061}),
    Trial("Ridge", "alpha 1e3", {"late": 0.060}),
    Trial("Ridge", "alpha 1e4", {"late": 0.055, "2021-01 to 2021-06": 0.025}),
    Trial("Ridge", "alpha 1e5 (kept)", {"late": 0.065, "early": 0.047, "2021-01 to 2021-06": 0.038}),
    Trial("LightGBM", "31 leaves of 200 rows at 0.05", {"late": 0.013}),
    Trial("LightGBM", "15 leaves of 500 rows at 0.03 (kept)", {"late": 0.030, "early": 0.020}),
    Trial("decoder", "lr 1e-3, 200 steps, 300 names, looked at four times", {"late": 0.039}),
    Trial("decoder", "lr 3e-4, 60 steps", {"late": -0.001, "2021-01 to 2021-06": -0.002}),
    Trial("decoder", "lr 1e-3, 60 steps, with MTP", {"late": 0.062, "2021-01 to 2021-06": 0.025}),
    Trial("decoder", "lr 3e-3, 80 steps, the fifteen features among its inputs", {"2021-01 to 2021-06": 0.008}),
    Trial("decoder", "lr 1e-3, 60 steps", {"late": 0.055, "early": 0.048}),
    Trial("decoder", "lr 2e-3, 60 steps", {"late": 0.063, "early": 0.055}),
    Trial("decoder", "lr 4e-3, 60 steps", {"late": 0.066, "early": 0.054}),
    Trial("decoder", "lr 4e-3, 80 steps, with MTP (kept)", {"late": 0.069, "early": 0.044}),
)
NUM_TRIALS = len(TRIALS)
