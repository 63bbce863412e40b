"""A tiny random checkpoint with a tokenizer, and answers said in advance for what must not depend on its weights."""

import io
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory) -> Path:
    """A V3 of 20,000 parameters in the published format; 50,000 positions, so that an answer can be interrupted."""
    import torch

    from fireflyer import ModelConfig, save_model
    from fireflyer.model.decoder import Decoder, init_weights_
    from fireflyer.text.tokenizer import Tokenizer

    config = ModelConfig(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=32,
        moe_intermediate_size=8,
        num_hidden_layers=2,
        first_k_dense_replace=1,
        num_attention_heads=2,
        q_lora_rank=None,
        kv_lora_rank=8,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        routed_scaling_factor=1.0,
        max_position_embeddings=50_000,
        initializer_range=0.16,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = Decoder(config)
    init_weights_(model, torch.Generator().manual_seed(0))
    folder = tmp_path_factory.mktemp("models") / "tiny"
    save_model(model, folder)
    Tokenizer.train(["the quick brown fox", "jumps over the lazy dog"] * 4, vocab_size=300).save(folder)
    return folder


@pytest.fixture
def scripted(monkeypatch, tiny_checkpoint) -> Callable[[list[bytes]], None]:
    """scripted([b"...", ...]): the next tokens drawn are these bytes, one token a byte, each answer closed by its end
    token; then whatever the model says."""
    from fireflyer.infer.sampler import SampledToken, Sampler
    from fireflyer.text.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_file(tiny_checkpoint)
    by_byte = {tokenizer.token_bytes(token): token for token in range(tokenizer.vocab_size)}

    def script(answers: list[bytes]) -> None:
        tokens = [t for answer in answers for t in [*(by_byte[bytes([b])] for b in answer), tokenizer.eos_id]]
        monkeypatch.setattr(Sampler, "__call__", lambda self, rows, logits: [SampledToken(tokens.pop(0))])

    return script


@pytest.fixture
def stdin(monkeypatch) -> Callable[[bytes], None]:
    """stdin(b"..."): what the command reads."""

    def give(data: bytes) -> None:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))

    return give
