"""The loader against a naive one, and against itself stopped, resumed, and spread over ranks."""

import itertools
import json
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch

from fireflyer.data.files import ReadOptions
from fireflyer.data.fim import split_middle
from fireflyer.data.loader import Loader
from fireflyer.data.mixture import Mixture, open_sources
from fireflyer.data.packing import Batch
from fireflyer.errors import UserError
from fireflyer.text.special_tokens import FIM_BEGIN, FIM_END, FIM_HOLE
from fireflyer.text.tokenizer import Tokenizer

FIELDS = ("input_ids_BT", "labels_BT", "positions_BT", "document_ids_BT")


@pytest.fixture
def specs(folder, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A folder with one file that is read in parts, JSON lines, and problems without end; weights 1 : 2 : 0.5."""
    monkeypatch.setattr("fireflyer.data.mixture.ReadOptions", partial(ReadOptions, part_bytes=64))
    path = folder(
        {f"docs/{i}.txt": f"document {i} the quick fox\n" * (i % 3 + 1) for i in range(12)}
        | {"docs/long.txt": "".join(f"line {i} über\n" for i in range(60))}
        | {"rows.jsonl": "".join(json.dumps({"text": f"row {i} " + "dog " * (i % 7)}) + "\n" for i in range(30))}
    )
    return [f"{path}/docs:1", f"{path}/rows.jsonl:2", "builtin:arithmetic:0.5"]


def whole_text(mixture: Mixture, source: int, document: int) -> str:
    one = mixture.sources[source]
    return "".join(one.read(document, part).text for part in range(one.num_parts(document)))


def naive_stream(mixture: Mixture, tokenizer: Tokenizer, seed: int, fim_rate: float, length: int):
    """(token, counts, document number) one by one, from the rules as they are written in the docs."""
    orders = [iter(()) for _ in mixture.sources]
    epochs = [-1] * len(orders)
    given = [0] * len(orders)
    special = tokenizer.special_id
    documents = itertools.count()
    stream: list[tuple[int, bool, int]] = []
    while len(stream) < length:
        source = min(range(len(orders)), key=lambda i: (given[i] / mixture.weights[i], i))
        document = next(orders[source], None)
        if document is None:
            epochs[source] += 1
            orders[source] = iter(mixture.order(source, seed, epochs[source]))
            document = next(orders[source])
        one = mixture.sources[source]
        prompt = one.read(int(document)).loss_from
        text = whole_text(mixture, source, int(document))
        ids = tokenizer.encode(text)
        middle_out = split_middle(text, fim_rate, seed, source, epochs[source], int(document))
        if middle_out and not prompt and one.num_parts(int(document)) == 1:
            prefix, middle, suffix = map(tokenizer.encode, middle_out)
            ids = [special(FIM_BEGIN), *prefix, special(FIM_HOLE), *suffix, special(FIM_END), *middle]
        number = next(documents)
        tokens = [tokenizer.bos_id, *ids, tokenizer.eos_id]
        # Prompts here are plain ASCII of one token a character; the begin token counts as part of the prompt.
        stream += [(token, not prompt or place > prompt, number) for place, token in enumerate(tokens)]
        given[source] += len(tokens)
    return stream


@pytest.mark.parametrize("mask_documents", [False, True])
@pytest.mark.parametrize("fim_rate", [0.0, 0.5])
def test_batches_equal_a_naive_loader(specs, tokenizer: Tokenizer, fim_rate: float, mask_documents: bool) -> None:
    mixture = open_sources(specs)
    seq_len, sizes = 37, [1, 4, 2, 30, 7, 40]
    loader = Loader(mixture, tokenizer, seq_len=seq_len, seed=3, fim_rate=fim_rate, mask_documents=mask_documents)
    stream = naive_stream(mixture, tokenizer, 3, fim_rate, sum(sizes) * seq_len + 1)
    row = 0
    for size in sizes:
        batch = loader.next_batch(size)
        for b in range(size):
            window = stream[row * seq_len : (row + 1) * seq_len + 1]
            first_document = window[0][2]
            position = 0
            for t in range(seq_len):
                token, _, document = window[t]
                label, counts, next_document = window[t + 1]
                if mask_documents and t and document != window[t - 1][2]:
                    position = 0
                if not counts or (mask_documents and next_document != document):
                    label = -100
                expected = [token, label, position, document - first_document]
                assert [int(getattr(batch, field)[b, t]) for field in FIELDS] == expected
                position += 1
            row += 1


def same(a: Batch, b: Batch) -> bool:
    return all(torch.equal(getattr(a, field), getattr(b, field)) for field in FIELDS)


def interleaved(parts: list[Batch]) -> Batch:
    """The global batch from the ranks' shares."""
    stacked = [torch.stack([getattr(part, field) for part in parts], dim=1).flatten(0, 1) for field in FIELDS]
    return Batch(*stacked)


def through_json(state: dict) -> dict:
    text = json.dumps(state)
    assert len(text) < 600, "a state is a few numbers, whatever the batch"
    return json.loads(text)


@pytest.mark.parametrize("mask_documents", [False, True])
def test_a_resumed_run_equals_one_never_stopped(specs, tokenizer: Tokenizer, mask_documents: bool) -> None:
    """Stopped after every batch in turn, and twice; the batch size grows; epochs end on the way."""
    mixture = open_sources(specs)

    def new_loader(rank: int = 0, world_size: int = 1) -> Loader:
        return Loader(open_sources(specs), tokenizer, seq_len=29, seed=1, fim_rate=0.5, mask_documents=mask_documents,
                      rank=rank, world_size=world_size)  # fmt: skip

    sizes = [2, 2, 4, 4, 8, 16, 8, 2, 24]
    whole = Loader(mixture, tokenizer, seq_len=29, seed=1, fim_rate=0.5, mask_documents=mask_documents)
    batches: list[Batch] = []
    states = [through_json(whole.state_dict())]
    for size in sizes:
        batches.append(whole.next_batch(size))
        states.append(through_json(whole.state_dict()))
    assert whole.epoch >= 2

    for stop in range(len(sizes)):
        resumed = new_loader()
        resumed.load_state_dict(states[stop])
        assert resumed.state_dict() == states[stop]
        assert same(resumed.next_batch(sizes[stop]), batches[stop])
        again = new_loader()
        again.load_state_dict(through_json(resumed.state_dict()))
        for later in range(stop + 1, len(sizes)):
            assert same(again.next_batch(sizes[later]), batches[later])
            assert again.state_dict() == states[later + 1]

    # Two ranks, then one, then two again.
    ranks = [new_loader(rank, 2) for rank in range(2)]
    for size, batch in zip(sizes[:3], batches[:3], strict=True):
        assert same(interleaved([loader.next_batch(size) for loader in ranks]), batch)
    assert [loader.state_dict() for loader in ranks] == [states[3]] * 2
    one = new_loader()
    one.load_state_dict(states[3])
    assert same(one.next_batch(sizes[3]), batches[3])
    ranks = [new_loader(rank, 2) for rank in range(2)]
    for loader in ranks:
        loader.load_state_dict(one.state_dict())
    for size, batch in zip(sizes[4:], batches[4:], strict=True):
        assert same(interleaved([loader.next_batch(size) for loader in ranks]), batch)


def test_every_document_is_seen_once_an_epoch_in_a_new_order(specs, tokenizer: Tokenizer) -> None:
    mixture = open_sources(specs[1:2], held_out=0)
    expected = Counter(whole_text(mixture, 0, i) for i in range(30))
    loader = Loader(mixture, tokenizer, seq_len=16, seed=0)
    tokens = torch.cat([loader.next_batch(4).input_ids_BT.flatten() for _ in range(40)]).tolist()
    log: list[str] = []
    while tokenizer.eos_id in tokens:
        end = tokens.index(tokenizer.eos_id)
        assert tokens[0] == tokenizer.bos_id
        log.append(tokenizer.decode(tokens[:end]))
        tokens = tokens[end + 1 :]
    epochs = [log[i : i + 30] for i in range(0, len(log) - 29, 30)]
    assert len(epochs) > 3
    for epoch in epochs:
        assert Counter(epoch) == expected
    assert epochs[0] != epochs[1] != epochs[2]


def test_the_epoch_counts_passes_over_the_data(folder, tokenizer: Tokenizer) -> None:
    mixture = open_sources([str(folder({"a.txt": "word " * 100}))], held_out=0)
    length = len(tokenizer.encode("word " * 100, bos=True, eos=True))
    loader = Loader(mixture, tokenizer, seq_len=length, seed=0)
    assert loader.epoch == 0
    for passes in (1, 2, 3):  # the row's last label is the next pass's begin token
        loader.next_batch(1)
        assert loader.epoch == passes


def test_shares_of_tokens_follow_the_weights(specs, tokenizer: Tokenizer) -> None:
    mixture = open_sources(specs)
    loader = Loader(mixture, tokenizer, seq_len=100, seed=0)
    for _ in range(30):
        loader.next_batch(10)
    tokens = loader.state_dict()["tokens"]
    for given, share in zip(tokens, (1 / 3.5, 2 / 3.5, 0.5 / 3.5), strict=True):
        assert abs(given / sum(tokens) - share) < 0.03


def test_a_stream_depends_on_the_seed(specs, tokenizer: Tokenizer) -> None:
    batches = [Loader(open_sources(specs), tokenizer, seq_len=64, seed=seed).next_batch(4) for seed in (0, 0, 1)]
    assert same(batches[0], batches[1])
    assert not same(batches[0], batches[2])


def test_changed_data_is_refused(specs, tokenizer: Tokenizer, tmp_path: Path) -> None:
    state = Loader(open_sources(specs), tokenizer, seq_len=8, seed=0).state_dict()
    with pytest.raises(UserError, match="another seed"):
        Loader(open_sources(specs), tokenizer, seq_len=8, seed=1).load_state_dict(state)
    with pytest.raises(UserError, match="other data sources"):
        Loader(open_sources(specs[:2]), tokenizer, seq_len=8, seed=0).load_state_dict(state)
    with (tmp_path / "data" / "rows.jsonl").open("ab") as file:
        file.write(b'{"text": "one more"}\n')
    with pytest.raises(UserError, match=r"rows\.jsonl: the text changed"):
        Loader(open_sources(specs), tokenizer, seq_len=8, seed=0).load_state_dict(state)


def test_what_cannot_be_loaded_is_told(specs, tokenizer: Tokenizer) -> None:
    with pytest.raises(UserError, match="batch_size 3 doesn't divide among 2 ranks"):
        Loader(open_sources(specs), tokenizer, seq_len=8, seed=0, world_size=2).next_batch(3)
    with pytest.raises(UserError, match="docs: all of it is held out"):
        Loader(open_sources(specs, held_out=1), tokenizer, seq_len=8, seed=0)
