"""The harness of the proofs: what a result file says, and that pages are filled from it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.__main__ import main, parts
from benchmarks._result import Proof, Table, machine_path, write_result
from benchmarks._tables import rewrite

PROOF = Proof(
    figures={"load_s": 1.234, "runs": [{"accuracy": 0.9876}]},
    tables={"load": Table(["what", "bytes"], [["all", 1234567], ["one", "1.5"]])},
    outputs={"screen": "\nline 1\nline 2\n"},
)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    write_result("speed", PROOF, 2.0, tmp_path)
    return tmp_path


def test_result_tells_command_commit_and_machine(results: Path) -> None:
    result = json.loads((results / "speed.json").read_text())
    assert result["command"] == "make proof PART=speed"
    assert result["figures"] == PROOF.figures
    assert result["missed"] == []
    assert result["machine"]["cores"] >= 1
    assert result["machine"]["torch"]
    assert set(result) >= {"commit", "uncommitted_changes", "date", "seconds"}


def test_table_block_is_filled_and_says_where_from(results: Path) -> None:
    page = "before\n<!-- table: speed.load -->stale<!-- end -->\nafter"
    filled = rewrite(page, results=results)
    assert filled.startswith(
        "before\n<!-- table: speed.load -->\n| what | bytes |\n| --- | --- |\n| all | 1,234,567 |\n"
    )
    assert "Made by `make proof PART=speed`" in filled
    assert filled.endswith("<!-- end -->\nafter")
    assert "stale" not in filled
    assert rewrite(filled, results=results) == filled
    assert "由 `make proof PART=speed` 生成" in rewrite(page, chinese=True, results=results)


def test_the_only_table_needs_no_name(results: Path) -> None:
    assert "| all | 1,234,567 |" in rewrite("<!-- table: speed --><!-- end -->", results=results)


def test_output_and_value_blocks(results: Path) -> None:
    assert "```text\nline 1\nline 2\n```" in rewrite("<!-- output: speed.screen --><!-- end -->", results=results)
    page = (
        "got <!-- value: speed.runs.0.accuracy .1% -->?<!-- end --> in <!-- value: speed.load_s .2f --><!-- end --> s"
    )
    filled = rewrite(page, results=results)
    assert "got <!-- value: speed.runs.0.accuracy .1% -->98.8%<!-- end --> in" in filled
    assert "-->1.23<!-- end --> s" in filled


@pytest.mark.parametrize("block", ["table: speed.none", "table: other.load", "value: speed.none", "output: speed.none"])
def test_a_block_without_a_result_is_refused(results: Path, block: str) -> None:
    with pytest.raises(ValueError, match=block):
        rewrite(f"<!-- {block} --><!-- end -->", source="page.md", results=results)


def test_a_result_with_a_machine_path_is_refused(tmp_path: Path) -> None:
    home = "/".join(["", "home", "me", "run"])
    assert machine_path(f"saved in {home}, done") == f"{home},"
    assert machine_path("see src/home/notes and https://example.org/home/page") is None
    with pytest.raises(ValueError, match="path of this machine"):
        write_result("speed", Proof(figures={}, outputs={"screen": f"saved {home}"}), 1.0, tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_unknown_part_names_those_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["no-such-part"]) == 2
    assert "no proof 'no-such-part'" in capsys.readouterr().err
    assert not any(part.startswith("_") for part in parts())


def test_without_a_card_the_measurement_of_fp8_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks.gpu import fp8

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert fp8.main() == 2
    assert capsys.readouterr().err == (
        "benchmarks.gpu.fp8: no CUDA card on this machine; run it where there is a Hopper card\n"
    )
