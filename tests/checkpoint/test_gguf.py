"""GGUF files that the `gguf` package writes as llama.cpp's converter does load to their own dequantised values."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf_files import WIDTHS, gguf_tensors, published_values, write_gguf
from published_models import own_model, yarn

from fireflyer import load_model, save_model
from fireflyer.checkpoint.hf import save_published, stream_published
from fireflyer.checkpoint.published import open_checkpoint
from fireflyer.model.decoder import Decoder


def tiny(**changes: object) -> Decoder:
    return own_model(**{**WIDTHS, "num_hidden_layers": 2, **changes})


def check(path: Path, model: Decoder, values: dict) -> Decoder:
    loaded = load_model(path)
    expected = published_values(model, values)
    for name, tensor in stream_published(loaded):
        assert torch.equal(tensor, expected[name]), name
    return loaded


@pytest.mark.parametrize("kind", [Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q5_1])
def test_values_are_its_own_dequantised_ones(kind: Kind, tmp_path: Path) -> None:
    model = tiny()
    loaded = check(tmp_path / "x.gguf", model, write_gguf(tmp_path / "x.gguf", model, kinds=kind))
    given = model.config.replace(eos_token_id=None, bos_token_id=None, pad_token_id=None, extra={})
    assert loaded.config.replace(extra={}) == given.replace(initializer_range=0.02)
    if kind is Kind.F32:
        ids = torch.randint(80, (2, 20))
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_joined_keys_and_values_and_fused_experts(tmp_path: Path) -> None:
    model = tiny(num_nextn_predict_layers=0)
    tensors = gguf_tensors(model, joined=True, fused=True)
    assert "blk.1.attn_kv_b.weight" in tensors
    assert "blk.1.ffn_gate_up_exps.weight" in tensors
    check(tmp_path / "x.gguf", model, write_gguf(tmp_path / "x.gguf", model, tensors, Kind.Q8_0))


def test_mixed_kinds_and_both_forms_of_kv_b(tmp_path: Path) -> None:
    """kv_b beside its halves, as ik_llama.cpp writes it; MTP copies quantised otherwise than the originals."""
    model = tiny()
    tensors = gguf_tensors(model) | gguf_tensors(model, joined=True)
    kinds = {"nextn.embed_tokens.weight": Kind.Q4_0, "token_embd.weight": Kind.Q8_0, "_exps.weight": Kind.Q4_0}
    values = write_gguf(tmp_path / "x.gguf", model, tensors, kinds)
    for layer in range(3):
        for part in ("k_b", "v_b"):
            values.pop(f"blk.{layer}.attn_{part}.weight")
    values["blk.2.nextn.embed_tokens.weight"] = values["token_embd.weight"]
    check(tmp_path / "x.gguf", model, values)


def test_v2_lite_and_older_metadata(tmp_path: Path) -> None:
    """As files of 2024: softmax, no query latent, no groups, no gating function; kv_b joined, head widths plain."""
    changes = {"topk_method": "greedy", "scoring_func": "softmax", "norm_topk_prob": False, "q_lora_rank": None}
    model = tiny(
        model_type="deepseek_v2", n_group=1, topk_group=1, rope_scaling=yarn(40, 0.707), routed_scaling_factor=1.0,
        num_nextn_predict_layers=0, **changes,
    )  # fmt: skip
    left_out = ("expert_gating_func", "expert_group_count", "expert_group_used_count", "expert_weights_scale",
                "expert_weights_norm", "key_length_mla", "value_length_mla", "key_length", "value_length")  # fmt: skip
    own = {"key_length": model.config.qk_head_dim, "value_length": model.config.v_head_dim}
    values = write_gguf(tmp_path / "x.gguf", model, gguf_tensors(model, joined=True), Kind.F32, left_out, **own)
    loaded = check(tmp_path / "x.gguf", model, values)
    assert loaded.config.topk_method == "greedy"
    assert loaded.config.rope_scaling == model.config.rope_scaling


def test_groups_of_a_released_model_that_older_files_leave_out(tmp_path: Path) -> None:
    from fireflyer.checkpoint.gguf_config import _groups

    v3 = {"hidden_size": 7168, "num_hidden_layers": 61, "n_routed_experts": 256, "num_attention_heads": 128}
    assert _groups(v3, None, None) == (8, 4)
    assert _groups({**v3, "hidden_size": 5120, "num_hidden_layers": 60, "n_routed_experts": 160}, None, None) == (8, 3)
    assert _groups({**v3, "hidden_size": 64}, None, None) == (1, 1)
    assert _groups(v3, 4, 2) == (4, 2)


def test_tied_head_and_no_mtp(tmp_path: Path) -> None:
    model = tiny(tie_word_embeddings=True, num_nextn_predict_layers=0)
    values = write_gguf(tmp_path / "x.gguf", model, kinds=Kind.Q8_0)
    assert "output.weight" not in values
    assert check(tmp_path / "x.gguf", model, values).config.tie_word_embeddings


def test_parts_of_one_file(tmp_path: Path) -> None:
    model = tiny()
    write_gguf(tmp_path / "whole.gguf", model, kinds=Kind.Q8_0)
    writer = gguf.GGUFWriter(tmp_path / "part.gguf", "deepseek2", split_max_tensors=7)
    reader = gguf.GGUFReader(tmp_path / "whole.gguf")
    for field in reader.fields.values():
        if field.name.startswith("deepseek2."):
            writer.add_key_value(field.name, field.contents(), field.types[0])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    parts = sorted(tmp_path.glob("part-*.gguf"))
    assert len(parts) > 2
    whole = dict(stream_published(load_model(tmp_path / "whole.gguf")))
    for given in (parts[0], parts[2]):
        for name, tensor in stream_published(load_model(given)):
            assert torch.equal(tensor, whole[name])


def test_rows_by_chunks_and_written_out(tmp_path: Path) -> None:
    """What converting and exporting do: any slice of rows; the folder that comes out loads to the same model."""
    model = tiny()
    values = write_gguf(tmp_path / "x.gguf", model, kinds=Kind.Q4_0)
    checkpoint, expected = open_checkpoint(tmp_path / "x.gguf"), published_values(model, values)
    for name, rows in checkpoint.tensors.items():
        for start in range(0, rows.shape[0], 29):
            assert torch.equal(rows[start : start + 29].float(), expected[name][start : start + 29]), name
    save_published(tmp_path / "out", checkpoint.config, checkpoint.tensors, dtype=torch.float32)
    for name, tensor in stream_published(load_model(tmp_path / "out")):
        assert torch.equal(tensor, expected[name]), name
    save_model(load_model(tmp_path / "x.gguf"), tmp_path / "saved")
    assert load_model(tmp_path / "saved").config == load_model(tmp_path / "out").config
