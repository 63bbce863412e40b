"""Blocks that llama.cpp's own quantiser wrote, read from a file: their values by loops written from ggml-quants.c."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from fireflyer.checkpoint.gguf_file import read_gguf

# One block each of a small model's file that llama-quantize made.
BLOCKS = {
    "Q4_K": (
        "240cc616ffefb8ea7ff5bbe8c4a375b9f48b5664640573874d9ff0c509a939d847f3635486c4e7b3d4f2aca66798945996b0777e"
        "422a7861c6a378f898095a52897b9c97760a06a58326a83786c5b13a580676f563b225c297e63539a364832fa041c66086d333b0"
        "3161b750b8bd819b27766303428eb9507939982eeb38a66f4cac76977a7ad6a4d97c6cd3169c1223"
    ),
    "Q6_K": (
        "042c3419671a1fcc4d1404fa7e50fe111f2a00a31046b12d54b54556d28f2f2c34371941bde34da35bab6e2a460019bf619fc17c"
        "86d5b6c686840f009a7deacfebaf670e0097ed89a03514d81100b8722ba46b4c87ef0041142bffcf1ac72250f368c111e5086d43"
        "c93547f33ee984e1f909c456389c5cb367997e57f07d065f67451ead158853e7d25913ddda80062661555d32836be0a1a59ec519"
        "96aba2931c822b029a99d45a8997d9266858595964945ca391de66e86b7daadd0093137a394cb641ba4ac64bd0c3adc04a80b448"
        "e502"
    ),
    "Q4_0": "9e2580878556a2a95b68887c586b9b979945",
    "Q8_0": "c6123cf30bebe5be5e5428db3def2ca02904fde9be0b3f5881f5cf16d5d6067d3e73",
    "Q5_0": "9e21e05f3771000d0bac5542b6c100f9b0c7271d238a",
}


def half(raw: bytes) -> float:
    return float(np.frombuffer(raw, np.float16)[0])


def q4_k(block: bytes) -> list[float]:
    scale, least, packed, numbers = half(block[:2]), half(block[2:4]), block[4:16], block[16:]
    values: list[float] = []
    for group in range(8):
        if group < 4:
            factor, offset = packed[group] & 63, packed[group + 4] & 63
        else:
            factor = (packed[group + 4] & 15) | (packed[group - 4] >> 6) << 4
            offset = packed[group + 4] >> 4 | (packed[group] >> 6) << 4
        for byte in numbers[32 * (group // 2) : 32 * (group // 2) + 32]:
            code = byte >> 4 if group % 2 else byte & 15
            values.append(scale * factor * code - least * offset)
    return values


def q6_k(block: bytes) -> list[float]:
    low, high, factors = block[:128], block[128:192], np.frombuffer(block[192:208], np.int8).astype(int)
    values = [0.0] * 256
    for part in range(2):
        for i in range(32):
            first, second = low[64 * part + i], low[64 * part + 32 + i]
            top = high[32 * part + i]
            codes = (first & 15, second & 15, first >> 4, second >> 4)
            for quarter, code in enumerate(codes):
                number = (code | (top >> 2 * quarter & 3) << 4) - 32
                factor = factors[8 * part + 2 * quarter + i // 16]
                values[128 * part + 32 * quarter + i] = half(block[208:]) * factor * number
    return values


def q4_0(block: bytes) -> list[float]:
    codes = [byte & 15 for byte in block[2:]] + [byte >> 4 for byte in block[2:]]
    return [half(block[:2]) * (code - 8) for code in codes]


def q8_0(block: bytes) -> list[float]:
    return [half(block[:2]) * number for number in np.frombuffer(block[2:], np.int8).astype(int)]


def q5_0(block: bytes) -> list[float]:
    top, numbers = int.from_bytes(block[2:6], "little"), block[6:]
    codes = [byte & 15 for byte in numbers] + [byte >> 4 for byte in numbers]
    return [half(block[:2]) * ((code | (top >> i & 1) << 4) - 16) for i, code in enumerate(codes)]


NAIVE: dict[str, Callable[[bytes], list[float]]] = {
    "Q4_K": q4_k,
    "Q6_K": q6_k,
    "Q4_0": q4_0,
    "Q8_0": q8_0,
    "Q5_0": q5_0,
}


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_of_the_quantiser(kind: str, tmp_path: Path) -> None:
    block = bytes.fromhex(BLOCKS[kind])
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "deepseek2")
    raw = np.frombuffer(block * 6, np.uint8).reshape(3, -1)  # three rows of two blocks
    writer.add_tensor("x", raw, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensor = read_gguf(tmp_path / "x.gguf").tensors["x"]
    expected = torch.tensor(NAIVE[kind](block) * 2, dtype=torch.float32)
    assert tensor.shape == (3, len(expected))
    for start, stop in ((0, 3), (1, 2), (2, 3)):
        rows = tensor.rows(start, stop)
        assert rows.shape == (stop - start, len(expected))
        torch.testing.assert_close(rows, expected.expand_as(rows), rtol=1e-6, atol=1e-6)
    assert expected.unique().numel() > 10
