"""How ranks share the work of training: the numbers, and whether they fit together. No torch.

pp stages of the layers; each is trained by dp · cp data ranks: dp take other sequences, cp other parts of the same
sequences; the routed experts are spread over ep of the data ranks (report 3.2.1: PP16, EP64, ZeRO-1).
"""

from __future__ import annotations

from dataclasses import dataclass

from fireflyer.config import ModelConfig
from fireflyer.errors import UserError


@dataclass(frozen=True)
class Layout:
    """zero: what data ranks share out: 1 the optimizer's state, 2 gradients too, 3 weights too."""

    pp: int = 1
    dp: int = 1
    cp: int = 1
    ep: int = 1
    zero: int = 1

    @property
    def data_ranks(self) -> int:
        return self.dp * self.cp

    @property
    def world(self) -> int:
        return self.pp * self.data_ranks

    @property
    def expert_copies(self) -> int:
        """Ranks that hold the same routed experts and share out their state."""
        return self.data_ranks // self.ep


def layout_for(world: int, *, pp: int, dp: int, cp: int, ep: int, zero: int) -> Layout:
    """The layout of so many ranks; dp = 0 takes all that pp and cp leave. Raises UserError where none comes out."""
    others = pp * cp
    if dp == 0:
        if world % others:
            raise UserError(
                f"{_ranks(world)} can't be shared by parallel.pp = {pp} times parallel.cp = {cp}; start a multiple of"
                f" {others}"
            )
        dp = world // others
    if pp * dp * cp != world:
        said = " x ".join(f"{name} = {n}" for name, n in (("pp", pp), ("dp", dp), ("cp", cp)))
        raise UserError(
            f"parallel: {said} is {_ranks(pp * dp * cp)}, and {world} run; start {pp * dp * cp}, as fireflyer launch -n"
            f" {pp * dp * cp}" + (f", or --set parallel.dp={world // others}" if world % others == 0 else "")
        )
    if (dp * cp) % ep:
        raise UserError(
            f"parallel.ep = {ep} doesn't divide the {dp * cp} data ranks (dp x cp); it can be"
            f" {_alternatives(divisors(dp * cp))}"
        )
    return Layout(pp, dp, cp, ep, zero)


def check_layout(layout: Layout, config: ModelConfig, *, batch_sizes: list[int], micro_batch_size: int) -> None:
    """Whether a model and its batches can be shared out so. Raises UserError: which number, and what would do."""
    experts = config.n_routed_experts
    if layout.ep > 1 and (not experts or experts % layout.ep):
        fitting = [n for n in divisors(layout.data_ranks) if experts and experts % n == 0]
        raise UserError(
            f"parallel.ep = {layout.ep} doesn't divide model.n_routed_experts = {experts}; it can be"
            f" {_alternatives(fitting or [1])}"
        )
    for size in batch_sizes:
        if size % layout.dp:
            fitting = [n for n in divisors(size) if n <= layout.dp]
            raise UserError(
                f"parallel.dp = {layout.dp} doesn't divide a batch of {size} sequences; dp can be"
                f" {_alternatives(fitting)}, or set batch_size to a multiple of {layout.dp}"
            )
        if micro_batch_size and (size // layout.dp) % micro_batch_size:
            raise UserError(
                f"parallel.micro_batch_size = {micro_batch_size} doesn't divide the {size // layout.dp} sequences that"
                f" each of {layout.dp} data ranks has of a batch of {size}; it can be"
                f" {_alternatives(divisors(size // layout.dp))}"
            )


def check_context(cp: int, seq_lens: list[int], mtp_depth: int) -> None:
    """Raises UserError where sequences of these lengths can't be cut for cp ranks: which number, and what would do."""
    for seq_len in seq_lens:
        if cp > 1 and seq_len % (2 * cp):
            lower = seq_len // (2 * cp) * 2 * cp
            would = f"{lower} or {lower + 2 * cp}" if lower else f"{2 * cp}"
            raise UserError(
                f"parallel.cp = {cp} cuts a sequence into {2 * cp} equal pieces, and seq_len = {seq_len} doesn't divide"
                f" by {2 * cp}; {would} would"
            )
        if cp > 1 and seq_len // (2 * cp) <= mtp_depth:
            raise UserError(
                f"parallel.cp = {cp} leaves pieces of {seq_len // (2 * cp)} tokens, too short for"
                f" model.num_nextn_predict_layers = {mtp_depth}; seq_len = {2 * cp * (mtp_depth + 1)} would do"
            )


def divisors(number: int) -> list[int]:
    """Rising."""
    return [n for n in range(1, number + 1) if number % n == 0]


def _ranks(count: int) -> str:
    return "1 rank" if count == 1 else f"{count} ranks"


def _alternatives(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:-1])) + (" or " if len(numbers) > 1 else "") + str(numbers[-1])
