"""The decoder: token ids or embeddings in, hidden states, logits of every depth and routing out.

`trunk` stops at the hidden states, so that training can take its loss in chunks and the market can put its own heads
on; `forward` goes on to logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fireflyer.config import ModelConfig
from fireflyer.model.attention import AttentionGroup, AttentionInputs, Form, causal_mask
from fireflyer.model.block import Block
from fireflyer.model.cache import LatentCache
from fireflyer.model.experts import Experts, Gate, MoE, Routing
from fireflyer.model.mtp import MTPModule
from fireflyer.model.norm import RMSNorm
from fireflyer.model.rope import rope_amplitude, rope_cos_sin, rope_frequencies
from fireflyer.model.row_tiles import RowTiles, linear

ABSORBED_UP_TO = 8
"""With a cache, calls of at most this many tokens run absorbed: beyond, expanding the latents once is cheaper."""


@dataclass(frozen=True)
class TrunkOutput:
    """hidden_BTD after the last norm; per MTP depth k (B, T-k, D) after its own norm; routing, main layers first."""

    hidden_BTD: Tensor
    mtp_hidden: list[Tensor]
    routing: list[Routing]


@dataclass(frozen=True)
class DecoderOutput:
    """logits (B, T, vocab); mtp_logits[k-1] (B, T-k, vocab), whose position i predicts token i+k+1."""

    logits: Tensor
    mtp_logits: list[Tensor]


class TokenRows(Protocol):
    """Tokens i of a call, and what must be known of their sequences."""

    @property
    def num_tokens(self) -> int:
        """Of a whole sequence."""
        ...

    def ids(self, depth: int = 0) -> Tensor:
        """(B, T') the tokens i + depth, of those i that have one; these come first among the i."""
        ...

    def attention(self, config: ModelConfig, depth: int = 0) -> AttentionInputs:
        """How those tokens i attend."""
        ...


class Tail(Protocol):
    """What follows the last layer, as `DecoderStack` has it."""

    @property
    def embed_tokens(self) -> nn.Module: ...

    @property
    def norm(self) -> nn.Module: ...

    @property
    def mtp(self) -> nn.ModuleList: ...


class DecoderStack(nn.Module):
    """Embedding, layers, last norm and the MTP modules: what the published names put under `model.`"""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mtp = nn.ModuleList(MTPModule(config, depth) for depth in range(config.num_nextn_predict_layers))


class Decoder(nn.Module):
    """DeepSeek-V3, V2, V2-Lite, R1, Moonlight or Kimi-K2; weights start unset, see `init_weights_`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = DecoderStack(config)
        self.lm_head: nn.Module | None = None
        """None where the embedding serves as head."""
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        positions: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: LatentCache | None = None,
        form: Form | None = None,
        num_mtp: int | None = None,
    ) -> DecoderOutput:
        """Logits of the main head and of each MTP depth; the arguments are `trunk`'s."""
        out = self.trunk(
            input_ids,
            inputs_embeds=inputs_embeds,
            positions=positions,
            document_ids=document_ids,
            cache=cache,
            form=form,
            num_mtp=num_mtp,
        )
        return DecoderOutput(self.head(out.hidden_BTD), [self.head(hidden) for hidden in out.mtp_hidden])

    def head(self, hidden: Tensor, tiles: RowTiles | None = None) -> Tensor:
        """(..., D) to (..., vocab); the one head that all depths share. tiles: as `trunk` takes them."""
        if self.lm_head is not None:
            return linear(self.lm_head, hidden, tiles)
        weight = self.model.embed_tokens.weight
        return F.linear(hidden, weight) if tiles is None else tiles.linear(hidden, weight)

    @property
    def dtype(self) -> torch.dtype:
        """Of hidden states."""
        return self.model.norm.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.model.norm.weight.device

    @property
    def head_weight(self) -> Tensor:
        """(vocab, D); the embedding's own where the configuration ties them. For training: a packed head has none."""
        if self.lm_head is None:
            return self.model.embed_tokens.weight
        assert isinstance(self.lm_head, nn.Linear)
        return self.lm_head.weight

    def embed(self, input_ids: Tensor | None) -> Tensor:
        """(...) int64 to (..., D)."""
        return self.model.embed_tokens(input_ids).to(self.dtype)

    def trunk(
        self,
        input_ids: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        positions: Tensor | None = None,
        document_ids: Tensor | None = None,
        cache: LatentCache | None = None,
        form: Form | None = None,
        num_mtp: int | None = None,
        recompute: bool = False,
        groups: Sequence[AttentionGroup] | None = None,
        tiles: RowTiles | None = None,
        forced_experts: Mapping[int, Tensor] | None = None,
    ) -> TrunkOutput:
        """Hidden states before the head.

        Args:
            input_ids: (B, T) int64; or give `inputs_embeds`, (B, T, D).
            positions: (B, T) int64; default 0.. T-1, or with a cache from its lengths on.
            document_ids: (B, T) int64; tokens see only their own document. Not with a cache.
            cache: read and extended in place; the caller advances its lengths.
            form: default absorbed for calls of up to 8 tokens with a cache, else expanded.
            num_mtp: MTP depths to run; default all, with a cache none.
            recompute: keep only each layer's input and run the layer again in the backward.
            groups: how the rows of a call (1, N) attend, for engines, which make them themselves: document_ids, cache,
                form and num_mtp are then not given, and each row's position must be.
            tiles: where given, each token's result has the same bits whatever is computed beside it: in any batch,
                chunk or cache. For inference; `form` is not asked, and document_ids are not possible.
            forced_experts: by layer index, (B·T, K) int64: the experts that main layers take instead of their gates'
                choice; rows of -1 choose for themselves.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if tiles is not None and document_ids is not None:
            raise ValueError("document_ids can't be combined with tiles: these are for inference")
        embeds_BTD = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        tokens = embeds_BTD.shape[1]
        if positions is None:
            start = 0 if cache is None else cache.lengths[:, None]
            positions = (torch.arange(tokens, device=embeds_BTD.device) + start).expand(embeds_BTD.shape[0], tokens)
        if form is None:
            form = "absorbed" if cache is not None and tokens <= ABSORBED_UP_TO else "expanded"
        cos_sin = rotary(self.config, positions)
        if groups is None:
            inputs = _attention_inputs(cos_sin, positions, document_ids, cache, form, tiles)
        else:
            inputs, num_mtp = AttentionInputs(*cos_sin, tuple(groups), tiles), 0
        if forced_experts is not None:
            inputs = replace(inputs, forced_experts=forced_experts)

        routing: list[Routing] = []
        hidden_BTD = run_layers(self.model.layers, embeds_BTD, inputs, recompute, routing)
        hidden_BTD = self.model.norm(hidden_BTD)

        if num_mtp is None:
            num_mtp = len(self.model.mtp) if cache is None else 0

        depths = []
        for depth in range(1, min(num_mtp, tokens - 1) + 1):
            rows = slice(tokens - depth)
            documents = None if document_ids is None else document_ids[:, rows]
            angles = (cos_sin[0][:, rows], cos_sin[1][:, rows])
            shifted = _attention_inputs(angles, positions[:, rows], documents, cache, form, tiles)
            depths.append((embeds_BTD[:, depth:], shifted))
        mtp_hidden = run_mtp(self.model.mtp, hidden_BTD, depths, recompute, routing)
        return TrunkOutput(hidden_BTD, mtp_hidden, routing)

    def trunk_of(self, tokens: TokenRows, *, recompute: bool = False) -> TrunkOutput:
        """`trunk` where only some tokens of each sequence are here, and others are elsewhere."""
        routing: list[Routing] = []
        inputs = tokens.attention(self.config)
        hidden_BTD = run_layers(self.model.layers, self.embed(tokens.ids()), inputs, recompute, routing)
        return run_tail(self.config, self.model, hidden_BTD, tokens, recompute, routing)

    def mtp_step(
        self,
        depth: int,
        hidden_BTD: Tensor,
        next_ids_BT: Tensor,
        positions_BT: Tensor,
        groups: Sequence[AttentionGroup],
        tiles: RowTiles | None = None,
    ) -> Tensor:
        """One MTP depth over the rows of an engine's call: hidden states after its norm, (1, N, D).

        Args:
            depth: from 0.
            hidden_BTD: (1, N, D), the depth before's hidden states of tokens i; the main model's for depth 0.
            next_ids_BT: (1, N), the tokens i + depth + 1.
            positions_BT: (1, N), the positions i.
            groups, tiles: as `trunk` takes them.
        """
        inputs = AttentionInputs(*rotary(self.config, positions_BT), tuple(groups), tiles)
        return self.model.mtp[depth](hidden_BTD, self.embed(next_ids_BT), inputs)[0]

    def gates(self) -> list[tuple[int, Gate]]:
        """(layer index, gate) of every MoE layer, in the order of `TrunkOutput.routing`; of those that are here, where
        a pipeline's ranks have some each."""
        blocks = [*self.model.layers, *(module.block for module in self.model.mtp)]
        return [(b.layer_index, b.mlp.gate) for b in blocks if isinstance(b, Block) and isinstance(b.mlp, MoE)]

    def gate_biases(self) -> list[tuple[int, Tensor]]:
        """(layer index, (E,) fp32 bias) of every MoE layer that is balanced by bias."""
        return [(i, g.e_score_correction_bias) for i, g in self.gates() if g.e_score_correction_bias is not None]


def rotary(config: ModelConfig, positions_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of these positions, as `AttentionInputs` takes them."""
    frequencies = rope_frequencies(config, positions_BT.device)
    return rope_cos_sin(frequencies, positions_BT, rope_amplitude(config.rope_scaling))


def run_layers(
    layers: Iterable[nn.Module], hidden_BTD: Tensor, inputs: AttentionInputs, recompute: bool, routing: list[Routing]
) -> Tensor:
    """One layer after the other; what the MoE layers among them decide is added to `routing`."""
    for layer in layers:
        hidden_BTD = _run(layer, recompute, routing, hidden_BTD, inputs)
    return hidden_BTD


def run_mtp(
    modules: Iterable[nn.Module],
    hidden_BTD: Tensor,
    depths: Iterable[tuple[Tensor, AttentionInputs]],
    recompute: bool,
    routing: list[Routing],
) -> list[Tensor]:
    """MTP depths 1, 2, ... on the normed hidden states of the main model: each one's hidden states.

    depths: by depth k, for the rows i that have a token i + k: the embeddings of these, and how the rows attend. The
    rows come first in the depth before.
    """
    mtp_hidden: list[Tensor] = []
    for module, (embeds_BTD, inputs) in zip(modules, depths, strict=False):  # not all depths may be run
        hidden_BTD = _run(module, recompute, routing, hidden_BTD[:, : embeds_BTD.shape[1]], embeds_BTD, inputs)
        mtp_hidden.append(hidden_BTD)
    return mtp_hidden


def run_tail(
    config: ModelConfig, tail: Tail, hidden_BTD: Tensor, tokens: TokenRows, recompute: bool, routing: list[Routing]
) -> TrunkOutput:
    """From the last layer's output on."""
    hidden_BTD = tail.norm(hidden_BTD)
    depths = [
        (tail.embed_tokens(tokens.ids(depth)), tokens.attention(config, depth))
        for depth in range(1, min(len(tail.mtp), tokens.num_tokens - 1) + 1)
    ]
    return TrunkOutput(hidden_BTD, run_mtp(tail.mtp, hidden_BTD, depths, recompute, routing), routing)


def _run(module: nn.Module, recompute: bool, routing: list[Routing], *args: Tensor | AttentionInputs) -> Tensor:
    """Call a layer; its routing is a return value, so that recomputation in the backward never counts it twice."""
    if recompute:
        hidden, decided = checkpoint(module, *args, use_reentrant=False, preserve_rng_state=False)
    else:
        hidden, decided = module(*args)
    if decided is not None:
        routing.append(decided)
    return hidden


def _attention_inputs(
    cos_sin: tuple[Tensor, Tensor],
    positions_BT: Tensor,
    document_ids_BT: Tensor | None,
    cache: LatentCache | None,
    form: Form,
    tiles: RowTiles | None = None,
) -> AttentionInputs:
    mask_BTS, num_slots = None, positions_BT.shape[1]
    if cache is not None:
        if document_ids_BT is not None:
            raise ValueError("document_ids can't be combined with a cache: a cached sequence is one document")
        num_slots = int(positions_BT.max()) + 1
        # A lone sequence's next token sees every slot; a mask would cost each layer two passes over its scores.
        if positions_BT.numel() > 1 or form == "expanded":
            slots_S = torch.arange(num_slots, device=positions_BT.device)
            mask_BTS = slots_S <= positions_BT[..., None]
    elif document_ids_BT is not None:
        same_BTS = document_ids_BT[:, :, None] == document_ids_BT[:, None, :]
        mask_BTS = same_BTS & causal_mask(positions_BT.shape[1], positions_BT.device)
    return AttentionInputs(*cos_sin, (AttentionGroup(positions_BT, mask_BTS, cache, num_slots, form),), tiles)


def compile_trunk(model: Decoder) -> Callable[..., TrunkOutput]:
    """`model.trunk` by torch.compile, without the routed experts.

    Their shapes depend on the routing, and the compiler's grouped_mm refuses fp32. They are marked here, not where they
    are written, because the mark loads the compiler: a second for everyone who never compiles.
    """
    for module in model.modules():
        if isinstance(module, Experts):
            module.forward = torch.compiler.disable(module.forward)  # pyright: ignore[reportAttributeAccessIssue]
    return torch.compile(model.trunk)


@torch.no_grad()
def init_weights_(model: Decoder, generator: torch.Generator) -> None:
    """Normal with `initializer_range` for matrices (V3 trains with 0.006), ones for norms, zeros for gate biases."""
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.fill_(1.0)
        else:
            parameter.normal_(0.0, model.config.initializer_range, generator=generator)
    for _, bias in model.gate_biases():
        bias.zero_()
