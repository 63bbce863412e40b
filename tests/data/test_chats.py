"""Chats from files: what is refused, and how sequences share a row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fireflyer.data.chats import PADDING, ChatLoader, best_fit, packed_rows, read_chats, split_lines
from fireflyer.data.packing import NO_LABEL
from fireflyer.errors import UserError
from fireflyer.text.taught import Taught
from fireflyer.text.tokenizer import Tokenizer

TOKENIZER = Tokenizer.train(["Hi there, be brief. " * 9], 300)
CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


def written(path: Path, *lines: Any) -> str:
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(path)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", r"line 2: not JSON"),
        ("[1]", r"line 2: .* is no JSON object"),
        ({"mesages": []}, r"line 2: unknown key 'mesages'; known are chat_template_kwargs, completion"),
        ({**CHAT, "tols": []}, r"line 2: unknown key 'tols'; known are"),
        ({"messages": CHAT["messages"][:1]}, r"line 2: the chat ends with 'user'"),
        ({"messages": CHAT["messages"][1:]}, r"line 2: message 0 is by 'assistant'"),
        ({"prompt": "a"}, r"line 2: give messages, or prompt and completion"),
        ({"prompt": "a", "completion": ""}, r"line 2: completion is empty"),
        ({"prompt": "a", "completion": "b" * 60}, r"line 2: 63 tokens, of which a row holds seq_len = 40"),
        ({**CHAT, "chat_template_kwargs": 3}, r"line 2: chat_template_kwargs must be an object"),
        ({**CHAT, "tools": [{}]}, r"line 2: tools\[0\] must be"),
    ],
)
def test_a_bad_line_is_named(line: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        read_chats([written(tmp_path / "c.jsonl", CHAT, line)], TOKENIZER, 40)


def test_files_that_hold_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"c\.jsonl: no lines in it"):
        read_chats([written(tmp_path / "c.jsonl", "")], TOKENIZER, 40)
    with pytest.raises(UserError, match="can't be read"):
        read_chats([str(tmp_path / "none.jsonl")], TOKENIZER, 40)


def test_prompts_and_completions_of_messages(tmp_path: Path) -> None:
    pair = {"prompt": [*CHAT["messages"], CHAT["messages"][0]], "completion": [{"role": "assistant", "content": "c"}]}
    ((taught,),) = read_chats([written(tmp_path / "c.jsonl", pair)], TOKENIZER, 40).lines
    learnt = [token for token, trained in zip(taught.token_ids, taught.trained, strict=True) if trained]
    assert learnt == [*TOKENIZER.encode("c"), TOKENIZER.eos_id]


@given(st.lists(st.integers(1, 20), min_size=1, max_size=40), st.integers(0, 9))
def test_best_fit_holds_everything_once_and_wastes_little(lengths: list[int], seed: int) -> None:
    order = sorted(range(len(lengths)), key=lambda i: (i * 7 + seed) % 11)
    bins = best_fit(lengths, 20, order)
    assert sorted(i for members in bins for i in members) == list(range(len(lengths)))
    fills = [sum(lengths[i] for i in members) for members in bins]
    assert max(fills) <= 20
    assert sum(fill <= 10 for fill in fills) <= 1  # two such would have gone into one
    assert len(bins) == len(best_fit(lengths, 20, range(len(lengths))))


def test_a_row_by_hand() -> None:
    first, second = Taught([5, 6, 7], [False, True, True]), Taught([8, 9], [False, True])
    batch = packed_rows([[first, second]], 5, pad_id=2)
    assert batch.input_ids_BT.tolist() == [[5, 6, 8, 2, 2]]
    assert batch.labels_BT.tolist() == [[6, 7, 9, NO_LABEL, NO_LABEL]]
    assert batch.positions_BT.tolist() == [[0, 1, 0, 0, 1]]
    assert batch.document_ids_BT.tolist() == [[0, 0, 1, PADDING, PADDING]]


def test_the_loader_goes_on_where_it_was_saved() -> None:
    sequences = [Taught(list(range(3, 4 + n)), [False] + [True] * n) for n in (3, 9, 4, 4, 7, 8, 2)]

    def loader() -> ChatLoader:
        return ChatLoader(sequences, ["x"], seq_len=10, seed=3, pad_id=2)

    whole = loader()
    batches = [whole.next_batch(3) for _ in range(7)]
    assert whole.epoch > 1
    for k in range(1, 7):
        before = loader()
        for _ in range(k):
            before.next_batch(3)
        after = loader()
        after.load_state_dict(json.loads(json.dumps(before.state_dict())))
        for batch in batches[k:]:
            assert torch.equal(after.next_batch(3).input_ids_BT, batch.input_ids_BT)
    other = ChatLoader(sequences, ["y"], seq_len=10, seed=3, pad_id=2)
    with pytest.raises(UserError, match="the data changed"):
        other.load_state_dict(whole.state_dict())


def test_lines_are_held_out_whole(tmp_path: Path) -> None:
    chats = read_chats([written(tmp_path / "c.jsonl", *[CHAT] * 10)], TOKENIZER, 40)
    train, held = split_lines(chats, 0.3, seed=1)
    assert (len(train), len(held)) == (7, 3)
    assert [len(part) for part in split_lines(chats, 0.001, seed=1)] == [9, 1]
    assert [len(part) for part in split_lines(chats, 0, seed=1)] == [10, 0]
