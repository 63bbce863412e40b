"""Specs, weights, sampling and counting."""

import ast
import json
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from fireflyer.data.counting import check_enough_data, count_tokens
from fireflyer.data.documents import FileDocuments
from fireflyer.data.files import ReadOptions
from fireflyer.data.loader import Loader
from fireflyer.data.mixture import interleave, open_sources, parse_spec
from fireflyer.errors import UserError
from fireflyer.text.tokenizer import Tokenizer


def test_a_spec_is_a_path_and_perhaps_a_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("odd:3").mkdir()
    assert parse_spec("books/:2.5") == ("books/", 2.5)
    assert parse_spec("odd:3") == ("odd:3", None)
    assert parse_spec("odd:3:2") == ("odd:3", 2.0)
    assert parse_spec(r"C:\data") == (r"C:\data", None)
    assert parse_spec("builtin:stdlib") == ("builtin:stdlib", None)
    assert parse_spec("builtin:arithmetic:1e-1") == ("builtin:arithmetic", 0.1)
    for weight in ("0", "-1", "nan", "inf"):
        with pytest.raises(UserError, match=f"weight of a source must be above 0, got {weight}"):
            parse_spec(f"books:{weight}")


def test_sources_that_are_not_there_are_told(tmp_path: Path) -> None:
    with pytest.raises(
        UserError,
        match="no data called builtin:stdlb: there are builtin:stdlib, builtin:arithmetic, builtin:expressions and",
    ):
        open_sources(["builtin:stdlb"])
    with pytest.raises(UserError, match=r"no data at .*/none"):
        open_sources([f"{tmp_path}/none:2"])
    with pytest.raises(UserError, match="no data: name at least one"):
        open_sources([])
    with pytest.raises(UserError, match="got 'ignore'"):
        open_sources(["builtin:arithmetic"], encoding_errors="ignore")


def test_everything_is_read_before_anything_begins(folder) -> None:
    path = folder({"good.txt": "text", "z/bad.jsonl": '{"text": "x"}\n{}'})
    with pytest.raises(UserError, match=r"bad\.jsonl, line 2"):
        open_sources([f"{path}/good.txt", "builtin:arithmetic", str(path)])


def test_weights_are_sizes_unless_one_is_given(folder) -> None:
    path = folder({"a.txt": "x" * 3000, "b.txt": "y" * 1000})
    a, b = f"{path}/a.txt", f"{path}/b.txt"
    assert open_sources([a, b], held_out=0).weights == [3000, 1000]
    assert open_sources([a, f"{b}:4"], held_out=0).weights == [1, 4]
    assert open_sources([a, "builtin:arithmetic"], held_out=0).weights == [1, 1]


def test_unweighted_sources_are_through_at_the_same_time(folder, tokenizer: Tokenizer) -> None:
    rows = ["".join(json.dumps({"text": f"row {i} of many"}) + "\n" for i in range(n)) for n in (300, 100)]
    path = folder({"a.jsonl": rows[0], "b.jsonl": rows[1]})
    mixture = open_sources([f"{path}/a.jsonl", f"{path}/b.jsonl"])
    loader = Loader(mixture, tokenizer, seq_len=32, seed=0)
    while loader.epoch == 0:
        loader.next_batch(1)
    for (epoch, place, _), source in zip(loader.state_dict()["cursors"], mixture.sources, strict=True):
        assert epoch + place / source.num_documents > 0.9


def test_interleaved_streams_follow_their_weights_until_they_end() -> None:
    taken = list(interleave([["a"] * 100, ["bb"] * 100, []], [1, 3, 5], size=len))
    assert taken.count("a") == taken.count("bb") == 100
    start = "".join(taken[:60])
    assert abs(start.count("b") / len(start) - 0.75) < 0.03


def test_tokens_are_counted_as_the_loader_gives_them(folder, tokenizer: Tokenizer) -> None:
    path = folder({f"{i}.txt": f"some words {i} " * i for i in range(1, 40)})
    mixture = open_sources([str(path)])
    source = mixture.sources[0]
    expected = sum(len(tokenizer.encode(source.read(int(i)).text)) + 2 for i in mixture.order(0, 5, 0))
    assert count_tokens(mixture, tokenizer) == expected
    check_enough_data(mixture, tokenizer, batch_size=1, seq_len=expected - 1)
    with pytest.raises(UserError, match=f"{expected} tokens .* too little data for one batch of 1 x {expected}"):
        check_enough_data(mixture, tokenizer, batch_size=1, seq_len=expected)
    endless = open_sources([str(path), "builtin:arithmetic"])
    check_enough_data(endless, tokenizer, batch_size=10**6, seq_len=10**6)
    with pytest.raises(UserError, match="builtin:arithmetic has no end"):
        count_tokens(endless, tokenizer)


def test_a_sample_holds_each_training_document_once(folder) -> None:
    path = folder({f"{i}.txt": f"text {i}" for i in range(200)})
    mixture = open_sources([str(path)], held_out=0.1)
    sample = list(mixture.sample_texts(0))
    assert sorted(sample) == sorted(mixture.sources[0].read(int(i)).text for i in mixture.order(0, 1, 0))
    assert len(sample) == mixture.sources[0].num_documents < 200
    assert sample != list(mixture.sample_texts(1))
    assert 1000 < len(list(open_sources(["builtin:arithmetic"]).sample_texts(0))) < 10_000


def test_an_index_holds_no_texts(folder) -> None:
    text = "a line of some length, " * 50
    path = folder({"a.jsonl": "".join(json.dumps({"text": f"{i} {text}"}) + "\n" for i in range(500))})
    documents = FileDocuments("a", [path / "a.jsonl"], ReadOptions())
    held = sum(array.nbytes for array in vars(documents).values() if hasattr(array, "nbytes"))
    assert held < 64 * 500
    assert not any(text in str(value) for value in vars(documents).values())


def test_builtin_stdlib_leaves_out_what_is_not_utf8(folder, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder({"b.py": "b = 1", "a.py": b"# \xe4\n" + b"x" * 99, "sub/c.py": "# ä", "test/d.py": "d", "e.txt": "e"})
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(path)})
    source = open_sources(["builtin:stdlib"], held_out=0).sources[0]
    assert [source.read(i).text for i in range(source.num_documents or 0)] == ["b = 1", "# ä"]
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(path / "none")})
    with pytest.raises(UserError, match="no library source"):
        open_sources(["builtin:stdlib"])


def test_builtin_stdlib_is_the_librarys_own_source(tokenizer: Tokenizer) -> None:
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
    expected = {}
    for path in root.rglob("*.py"):
        if not left_out & set(path.relative_to(root).parts):
            try:
                text = path.read_bytes().decode("utf-8")
            except UnicodeDecodeError:
                continue
            if text.strip():
                expected[path.relative_to(root).as_posix()] = text.removeprefix("\ufeff")
    mixture = open_sources(["builtin:stdlib"], held_out=0)
    source = mixture.sources[0]
    found = ["".join(source.read(i, p).text for p in range(source.num_parts(i))) for i in range(len(expected))]
    assert found == [expected[name] for name in sorted(expected)]
    assert len(found) > 300
    for text in found[::20]:
        ast.parse(text)
    script = "from fireflyer.data.mixture import open_sources; print(open_sources(['builtin:stdlib']).fingerprint()[0])"
    out = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, encoding="utf-8")
    assert out.stdout.strip() == source.fingerprint()
