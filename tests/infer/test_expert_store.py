"""Experts behind a store: the same tokens whatever its size, its limit kept, and the much used ones kept."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from gguf_files import write_gguf
from published_models import own_model, yarn

from fireflyer import LLM, SamplingParams, UserError, save_model
from fireflyer.config.sizes import parse_bytes
from fireflyer.infer.expert_store import ExpertStore
from fireflyer.infer.stored_weights import find_store

# As wide as vector registers and more, so that every path of the products is met.
SHAPE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "max_position_embeddings": 256,
    "rope_scaling": yarn(4, 1.0),
}
EXPERT = 3 * 64 * 32 * 4
PAGED = -(-EXPERT // 4096) * 4096
PROMPTS = [[5, 9, 2, 77, 41] * 8, [3], [8, 8, 1], list(range(60))]
PARAMS = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True, logprobs=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experts")
    model = own_model(**SHAPE)
    save_model(model, folder / "fp32")
    save_model(model.bfloat16(), folder / "bf16")
    write_gguf(folder / "x.gguf", own_model(**SHAPE))
    return folder


def answers(llm: LLM) -> list[object]:
    """Tokens and log-probabilities, which show the last bit."""
    alone = [llm.generate([prompt], PARAMS)[0] for prompt in PROMPTS[:2]]
    together = llm.generate(PROMPTS, PARAMS)
    return [(output.outputs[0].token_ids, output.outputs[0].logprobs) for output in [*alone, *together]]


@pytest.mark.parametrize("source", ["fp32", "bf16", "x.gguf"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_the_same_to_the_bit_at_any_size(folder: Path, source: str, deterministic: bool) -> None:
    expected = answers(LLM(folder / source, deterministic=deterministic))
    for num_experts in (1, 5, 1000):
        llm = LLM(folder / source, deterministic=deterministic, expert_memory=num_experts * PAGED)
        assert answers(llm) == expected
        stats = llm.engine.stats
        assert stats.expert_bytes <= num_experts * PAGED
        assert stats.expert_misses > (0 if num_experts > 48 else 100)


def test_the_same_in_bf16_arithmetic(folder: Path) -> None:
    expected = answers(LLM(folder / "bf16", dtype=torch.bfloat16))
    assert answers(LLM(folder / "bf16", dtype=torch.bfloat16, expert_memory=3 * PAGED)) == expected


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_packed_folders(folder: Path, kind: str, tmp_path: Path) -> None:
    from fireflyer.checkpoint.packed import plan_packed
    from fireflyer.checkpoint.published import open_checkpoint

    checkpoint = open_checkpoint(folder / "fp32")
    plan_packed(checkpoint.config, checkpoint.tensors, kind).write(tmp_path)
    expected = answers(LLM(tmp_path))
    for limit in (4096 * 4, 4096 * 40, "1GiB"):
        llm = LLM(tmp_path, expert_memory=limit)
        assert answers(llm) == expected
        store = find_store(llm.model)
        assert store is not None
        assert (store.misses <= store.num_experts) == (limit == "1GiB")


class Counted:
    """16 experts of one page, whose bytes say which they are."""

    num_experts, num_bytes = 16, 4096

    def __init__(self) -> None:
        self.reads: Counter[int] = Counter()

    def read(self, expert: int, into: torch.Tensor) -> None:
        self.reads[expert] += 1
        into.fill_(expert)


def test_what_is_used_much_stays() -> None:
    """Layers in turn, as tokens go through them; three experts of each are used always, the others now and then."""
    layers = [Counted() for _ in range(4)]
    store = ExpertStore(layers, 16 * 4096)
    generator = torch.Generator().manual_seed(0)
    for _ in range(400):
        for index in range(4):
            rare = 3 + int(torch.randint(13, (1,), generator=generator))
            experts = [0, 1, 2, rare]
            assert [int(block[0]) for block in store.take(index, experts)] == experts
    often = sum(layer.reads[expert] for layer in layers for expert in range(3))
    assert often <= 3 * 12  # few times each, while nothing was known; plain recency would read 4,800 times
    assert store.hits + store.misses == 400 * 16
    assert store.hits >= 400 * 12 - often


def test_many_uses_weigh_more_than_the_last_one() -> None:
    first, second = Counted(), Counted()
    store = ExpertStore([first, second], 4 * 4096)
    for often in [[0, 1]] * 10 + [[2], [3]]:
        store.take(0, often)
        store.take(1, [9])
    assert [store.is_resident(0, expert) for expert in range(4)] == [True, True, False, True]


def test_a_cycle_longer_than_memory_keeps_what_fits() -> None:
    """The same 24 experts at each token, 16 places: plain recency finds none, we all but those that take turns."""
    layers = [Counted() for _ in range(4)]
    store = ExpertStore(layers, 16 * 4096)
    for _ in range(50):
        for index in range(4):
            for expert in range(6):
                store.take(index, [expert])
    assert store.hits >= 49 * 15


def test_experts_of_one_call_never_drive_each_other_out() -> None:
    store = ExpertStore([Counted()], 4 * 4096)
    for start in range(12):
        blocks = store.take(0, [start, start + 1, start + 2, start + 3, start][:4])
        assert [int(block[0]) for block in blocks] == [start, start + 1, start + 2, start + 3]
    assert store.layer(0).in_order([0, 11, 1, 12]) == [11, 12, 0, 1]
    twice = store.take(0, [7, 7])
    assert twice[0].data_ptr() == twice[1].data_ptr()


def test_a_failed_read_leaves_nothing_half_read() -> None:
    class Failing(Counted):
        def read(self, expert: int, into: torch.Tensor) -> None:
            super().read(expert, into)
            if expert == 9 and self.reads[9] == 1:
                raise UserError("cut short")

    store = ExpertStore([Failing()], 2 * 4096)
    store.take(0, [1, 2])
    with pytest.raises(UserError):
        store.take(0, [9])
    assert not store.is_resident(0, 9)
    assert [int(block[0]) for block in store.take(0, [9, 2])] == [9, 2]


def test_heat_never_overflows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fireflyer.infer.expert_store._LARGEST", 2.0)
    layer = Counted()
    store = ExpertStore([layer], 3 * 4096)
    for turn in range(2000):
        store.take(0, [0, 1, 2 + turn % 14])
    assert layer.reads[0] == layer.reads[1] == 1


RESIDENT = """
import os, sys, torch
from pathlib import Path
from fireflyer.infer.stored_weights import load_with_store
from fireflyer.checkpoint.published import open_checkpoint
from fireflyer.infer.stored_weights import find_store

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

model = load_with_store(open_checkpoint(sys.argv[1]), torch.float32, int(sys.argv[2]))
store = find_store(model)
store.take(0, [0])
before = resident() - store.resident_bytes
for turn in range(3):
    for layer in range(2):
        for expert in range(16):
            store.take(layer, [expert])
print(resident() - before, store.capacity, store.expert_bytes)
"""


def test_resident_memory_stays_within_the_limit(tmp_path: Path) -> None:
    """In a process of its own: 32 experts of 3 MiB go through 12 MiB."""
    wide = {**SHAPE, "hidden_size": 512, "moe_intermediate_size": 512, "num_hidden_layers": 3}
    save_model(own_model(**wide, num_nextn_predict_layers=0), tmp_path / "wide")
    limit = 12 << 20
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RESIDENT, str(tmp_path / "wide"), str(limit)]
    out = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    grown, capacity, expert_bytes = map(int, out.split())
    assert expert_bytes == 3 << 20
    assert capacity == 4
    assert 9 << 20 < grown < limit + (3 << 20)  # the buffers of one read beside it


def test_what_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expert_memory is 100 bytes, but one expert takes 24,576; give at least that"):
        LLM(folder / "fp32", expert_memory=100)
    with pytest.raises(UserError, match="expert_memory is 'lots'; give a size such as 8GiB"):
        LLM(folder / "fp32", expert_memory="lots")
    with pytest.raises(UserError, match=r"convert .* --to int4"):
        LLM(folder / "fp32", expert_memory="1GiB", quantization="int4")
    save_model(own_model(n_routed_experts=0, n_group=1, num_experts_per_tok=0), tmp_path / "dense")
    with pytest.raises(UserError, match="has no routed experts"):
        LLM(tmp_path / "dense", expert_memory="1GiB")


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GiB", 8 << 30), ("8GB", 8 * 10**9), ("1.5g", 1_500_000_000), ("512 MiB", 512 << 20), ("4096", 4096), (77, 77)],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_bytes(text, "x") == size


@pytest.mark.parametrize("text", ["", "GiB", "-1GiB", "8Gib4", "0", "8i", True, 0, "nan"])
def test_sizes_refused(text: str | int) -> None:
    with pytest.raises(UserError, match=r"^x is "):
        parse_bytes(text, "x")
