"""Files of every kind become the documents that Python's own readers see, or one line of help."""

import builtins
import errno
import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fireflyer.data import parquet
from fireflyer.data.documents import FileDocuments, find_files
from fireflyer.data.files import ReadOptions
from fireflyer.errors import UserError
from fireflyer.text.tokenizer import Tokenizer


def open_documents(path: Path, **options) -> FileDocuments:
    return FileDocuments(str(path), find_files(path), ReadOptions(**options))


def texts(source: FileDocuments) -> list[str]:
    return [
        "".join(source.read(document, part).text for part in range(source.num_parts(document)))
        for document in range(source.num_documents)
    ]


def test_a_folder_is_read_in_order_without_hidden_or_unknown_files(folder) -> None:
    path = folder(
        {
            "b.txt": "bé\r\n",
            "a/z.py": "print('z')",
            "a/Y.MD": "# y",
            "c.jsonl": '{"text": "one"}\n\n{"text": "zwei ü", "other": 1}\r\n{"text": "  "}',
            "empty.txt": "",
            "blank.txt": " \n",
            ".hidden.txt": "no",
            ".git/x.txt": "no",
            "image.png": "no",
        }
    )
    assert texts(open_documents(path)) == ["# y", "print('z')", "bé\r\n", "one", "zwei ü"]


def test_a_byte_order_mark_is_no_text(folder) -> None:
    path = folder({"a.txt": "\ufeffhi", "b.jsonl": '\ufeff{"text": "x"}\n{"text": "\ufeffy"}'})
    assert texts(open_documents(path)) == ["hi", "x", "\ufeffy"]


line = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(str.strip)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(line, min_size=1, max_size=10), ascii_only=st.booleans())
def test_any_lines_of_json_are_read_at_random(tmp_path: Path, rows: list[str], ascii_only: bool) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"".join(json.dumps({"text": row}, ensure_ascii=ascii_only).encode() + b"\n" for row in rows))
    source = open_documents(path)
    assert [source.read(i).text for i in reversed(range(len(rows)))] == rows[::-1]
    assert list(source.document_bytes) == [len(row.encode()) for row in rows]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.lists(st.one_of(st.text(max_size=9), st.sampled_from(["\n", "\n\nab", "🙂" * 9, " "]))).map("".join))
def test_a_long_file_is_one_document_in_parts(tmp_path: Path, text: str) -> None:
    (tmp_path / "long.txt").write_bytes(("x" + text).encode())
    source = open_documents(tmp_path / "long.txt", part_bytes=16)
    assert texts(source) == ["x" + text]
    parts = [source.read(0, part).text for part in range(source.num_parts(0))]
    assert all(len(part.encode()) <= 16 for part in parts)
    assert int(source.document_bytes[0]) == sum(len(part.encode()) for part in parts)
    whole = open_documents(tmp_path / "long.txt")
    assert list(whole.hashes) == list(source.hashes)


def test_parts_end_at_line_breaks_where_no_token_is_cut(folder) -> None:
    text = "".join(f"line {i} of the quick fox\n" + "\n    " * (i % 5) + "\n" * (i % 3) for i in range(200))
    tokenizer = Tokenizer.train([text], 400)
    assert any(tokenizer.token_bytes(i).count(b"\n") > 2 for i in range(400))
    source = open_documents(folder({"a.txt": text}), part_bytes=300)
    assert source.num_parts(0) > 10
    ids = [i for part in range(source.num_parts(0)) for i in tokenizer.encode(source.read(0, part).text)]
    assert ids == tokenizer.encode(text)


def write_parquet(path: Path, columns: dict, row_group_size: int = 3) -> Path:
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table(columns), path, row_group_size=row_group_size)
    return path


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet_rows_are_documents(tmp_path: Path, kind: pa.DataType) -> None:
    rows = [f"Zeile {i} ü" for i in range(10)] + [""]
    source = open_documents(write_parquet(tmp_path / "a.parquet", {"text": pa.array(rows).cast(kind), "n": [1] * 11}))
    assert [source.read(i).text for i in reversed(range(10))] == rows[9::-1]
    assert source.num_documents == 10


def test_an_order_of_parquet_rows_reads_few_row_groups_at_a_time(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(parquet, "WINDOW_BYTES", 120)
    monkeypatch.setattr("fireflyer.data.documents.WINDOW_BYTES", 120)
    for name, first in (("a", 0), ("b", 30)):
        rows = [f"{i:010d}" for i in range(first, first + 30)]
        write_parquet(tmp_path / "data" / f"{name}.parquet", {"text": rows})
    (tmp_path / "data" / "c.txt").write_bytes(b"some text")
    source = open_documents(tmp_path / "data")
    order = source.order(1)
    assert sorted(order) == list(range(61))
    assert list(order) != list(source.order(2))
    reads = []
    original = pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile, "read_row_group", lambda self, group, **k: reads.append(group) or original(self, group, **k)
    )
    assert [source.read(int(i)).text for i in order if i < 60] == [f"{i:010d}" for i in order if i < 60]
    assert sorted(reads) == sorted([*range(10)] * 2), "each row group is decoded once"
    assert sum(column.nbytes for column in source._parquet._groups.values()) <= 2 * parquet.WINDOW_BYTES


def test_bad_parquet_is_told(tmp_path: Path, monkeypatch) -> None:
    path = write_parquet(tmp_path / "a.parquet", {"body": ["x"], "n": [1]})
    with pytest.raises(UserError, match=r"a\.parquet: no column 'text' \(it has: body, n\)"):
        open_documents(path)
    assert texts(open_documents(path, text_column="body")) == ["x"]
    with pytest.raises(UserError, match="column 'n' holds int64, not strings"):
        open_documents(path, text_column="n")
    with pytest.raises(UserError, match="row 1: 'text' is null"):
        open_documents(write_parquet(path, {"text": ["a", None]}))
    invalid = pa.array([b"ok", b"\xffno"]).cast(pa.binary()).view(pa.string())
    write_parquet(path, {"text": invalid})
    with pytest.raises(UserError, match="row 1: invalid UTF-8 at byte 0"):
        open_documents(path)
    assert texts(open_documents(path, encoding_errors="replace")) == ["ok", "\ufffdno"]
    path.write_bytes(b"no parquet")
    with pytest.raises(UserError, match="can't be read as parquet"):
        open_documents(path)
    for name in [name for name in sys.modules if name.split(".")[0] == "pyarrow"]:
        monkeypatch.delitem(sys.modules, name)
    original = builtins.__import__

    def without_pyarrow(name: str, *rest):
        if name.split(".")[0] == "pyarrow":
            raise ImportError(name)
        return original(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without_pyarrow)
    with pytest.raises(UserError, match=r"pip install 'fireflyer\[parquet\]'"):
        open_documents(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"ab\xffcd", r"a\.txt: invalid UTF-8 at byte 2 \(0xff\)"),
        ("a.txt", b"\xef\xbb\xbfab\xe2\x82", r"a\.txt: invalid UTF-8 at byte 5 \(0xe2\)"),
        ("a.md", b"a\n" * 100 + b"\xc3(", r"a\.md: invalid UTF-8 at byte 200 \(0xc3\)"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', r"a\.jsonl, line 2: invalid UTF-8 at byte 24"),
        ("a.jsonl", b'{"text": "a"}\n\n{"tex": "b", "id": 3}', r"line 3: no key 'text' \(it has: tex, id\)"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', r"line 2: not JSON"),
        ("a.jsonl", b'{"text": "a"}\n["text"]', r"line 2: list instead of an object"),
        ("a.jsonl", b'{"text": 5}', r"line 1: 'text' is int, not a string"),
        ("a.jsonl", rb'{"text": "\ud83d"}', r"line 1: half a surrogate pair"),
        ("a.txt", b"", r"a\.txt is empty"),
        ("a.txt", b" \n ", r"a\.txt is empty"),
    ],
)
def test_bad_text_is_told_with_its_place(folder, name: str, content: bytes, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        open_documents(folder({name: content}) / name, part_bytes=64)
    assert "\n" not in str(caught.value)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.lists(st.one_of(st.binary(max_size=9), st.text(max_size=9).map(str.encode))).map(b"".join))
def test_invalid_bytes_are_found_or_replaced_as_python_does(tmp_path: Path, data: bytes) -> None:
    data = b"x" + data
    (tmp_path / "a.txt").write_bytes(data)
    assert texts(open_documents(tmp_path / "a.txt", encoding_errors="replace", part_bytes=16)) == [
        data.decode("utf-8", "replace")
    ]
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        with pytest.raises(UserError, match=f"invalid UTF-8 at byte {error.start} "):
            open_documents(tmp_path / "a.txt", part_bytes=16)


def test_half_pairs_are_replaced_when_asked(folder) -> None:
    path = folder({"a.jsonl": r'{"text": "a\ud83d \ud83d\ude42"}'})
    assert texts(open_documents(path, encoding_errors="replace")) == ["a\ufffd 🙂"]


def test_paths_that_hold_no_text_are_told(folder, tmp_path: Path) -> None:
    path = folder({"a.png": "x", "sub/b.bin": "y", "e/1.txt": "", "e/2.md": "\n"})
    with pytest.raises(UserError, match=r"no data at .*nowhere"):
        find_files(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"no file in this folder can be read; .*\.md \.py \.txt \.jsonl \.parquet"):
        find_files(path / "sub")
    with pytest.raises(UserError, match=r"don't know how to read \.png; files ending in \.md"):
        find_files(path / "a.png")
    with pytest.raises(UserError, match=r"all 2 files in .* are empty"):
        open_documents(path / "e")


def test_unreadable_files_are_told(folder, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder({"a.txt": "x"})

    def refuse(self: Path, *_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)  # modes are nothing to root, which tests may run as
    with pytest.raises(UserError, match=r"a\.txt: can't be read: Permission denied"):
        open_documents(path)


def test_the_fingerprint_follows_text_and_order(folder) -> None:
    path = folder({"a.txt": "one", "b.txt": "two"})
    before = open_documents(path).fingerprint()
    (path / "b.txt").rename(path / "c.txt")
    assert open_documents(path).fingerprint() == before
    (path / "c.txt").write_bytes(b"tw0")
    assert open_documents(path).fingerprint() != before
