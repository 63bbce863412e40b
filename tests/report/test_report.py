"""What a report says of a run, and that it says so to someone whose browser has nothing else."""

from __future__ import annotations

import json
import re
import struct
from pathlib import Path

import pytest

from fireflyer.cli.main import main
from fireflyer.errors import UserError
from fireflyer.report import charts as charts_module
from fireflyer.report.charts import charts, heat_maps
from fireflyer.report.page import report_page
from fireflyer.report.png import write_pngs
from fireflyer.report.run_data import read_run, recipe_differences

from .made_run import made_run


def test_every_number_of_the_run_is_drawn_where_it_belongs(tmp_path: Path) -> None:
    run = read_run(made_run(tmp_path / "one", extra={"kl": 0.5, "new_metric": 2.0, "note": "no number", "flag": True}))
    found = {chart.key: chart for chart in charts([run])}
    loss = {line.name: line for line in found["loss"].lines}
    assert loss["training"].values == [row["loss"] for row in run.steps]
    assert loss["held out"].values == [5.5 / step for step in (10, 20, 30, 40)]
    assert loss["held out"].tokens == [step * 96 for step in (10, 20, 30, 40)]
    assert (loss["held out"].marks, loss["training"].marks) == (True, False)
    assert found["kl"].lines[0].values[0] == 0.5
    assert found["new_metric"].title == "new metric"
    assert found.keys().isdisjoint({"note", "flag", "step", "epoch", "train_s", "reward"})


def test_right_answers_have_a_chart_and_a_figure(tmp_path: Path) -> None:
    """What GRPO, distillation and DPO call accuracy; DPO's margins beside it, under the names that it writes."""
    run = read_run(made_run(tmp_path / "one", extra={"accuracy": 0.5, "eval_accuracy": 0.25, "reward_margin": 1.5}))
    found = {chart.key: [line.name for line in chart.lines] for chart in charts([run])}
    assert found["accuracy"] == ["training", "held out"]
    assert found["preference"] == ["margin"]
    assert "reward_margin" not in found
    assert "25.0%" in report_page([run])


def test_a_long_run_is_thinned_to_means_that_keep_its_sum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(charts_module, "MOST_POINTS", 10)
    run = read_run(made_run(tmp_path / "one"))
    line = next(chart for chart in charts([run]) if chart.key == "max_vio").lines[0]
    assert len(line.values) == 10
    assert line.steps == [4, 8, 12, 16, 20, 24, 28, 32, 36, 40]
    assert sum(line.values) * 4 == pytest.approx(sum(row["max_vio"] for row in run.steps))


def test_experts_are_maps_of_layers_over_time(tmp_path: Path) -> None:
    first, second = heat_maps([read_run(made_run(tmp_path / "one"))])
    assert (first.layer, second.layer) == (1, 2)
    assert first.steps == [5, 10, 15, 20, 25, 30, 35, 40]
    assert [column.index(8.0) for column in first.load] == [5, 2, 7, 4, 1, 6, 3, 0]
    assert first.bias[-1] == [0.04] * 8


def test_recipes_are_compared_key_by_key(tmp_path: Path) -> None:
    first = read_run(made_run(tmp_path / "one"))
    second = read_run(made_run(tmp_path / "two", schedule__lr=5e-3, model__hidden_size=64))
    assert recipe_differences(first, second) == [("model.hidden_size", 32, 64), ("schedule.lr", 2e-3, 5e-3)]


def test_the_page_holds_everything_and_no_text_can_break_out_of_it(tmp_path: Path) -> None:
    hostile = "</script><script>alert(1)</script>\u2028<!--"
    page = report_page([read_run(made_run(tmp_path / "one", hostile=hostile))], usd_per_hour=36.0)
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!data:)""", page)
    assert "@import" not in page
    assert hostile not in page
    assert page.count("</script>") == 3
    stored = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert stored is not None
    data = json.loads(stored.group(1))
    assert data["runs"][0]["samples"][0]["prompt"] == "Once " + hostile
    assert ["$0.2", "cost", "at $36 an hour"] in data["runs"][0]["tiles"]  # 40 half seconds


def test_pictures_are_pngs_of_every_chart(tmp_path: Path) -> None:
    runs = [read_run(made_run(tmp_path / "one")), read_run(made_run(tmp_path / "two", seed=3))]
    written = write_pngs(runs, tmp_path / "png")
    assert {path.name for path in written} == {
        *(f"{chart.key}.png" for chart in charts(runs)),
        "experts-one.png",
        "experts-two.png",
    }
    for path in written:
        head = path.read_bytes()[:24]
        assert head.startswith(b"\x89PNG")
        assert struct.unpack(">II", head[16:])[0] > 500


def test_what_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        read_run(tmp_path / "absent")
    with pytest.raises(UserError, match=r"no recipe\.toml in it"):
        read_run(tmp_path)
    empty = made_run(tmp_path / "empty", steps=0)
    with pytest.raises(UserError, match="no step yet"):
        read_run(empty)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = made_run(tmp_path / "one"), made_run(tmp_path / "two")
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(one)]) == 0
    assert capsys.readouterr().out.strip() == str(one / "report.html")
    assert "<title>one" in (one / "report.html").read_text(encoding="utf-8")
    assert main(["report", str(one), str(two)]) == 0
    assert "<title>one and two" in (tmp_path / "one-and-two.html").read_text(encoding="utf-8")
    for words in (["report", str(one), str(one)], ["report", "absent"], ["report", str(one), str(two), str(one)]):
        assert main(words) == 2
    (one / "metrics.jsonl").write_text('{"step": 1, "tokens": 5, "los', encoding="utf-8")
    assert main(["report", str(one)]) == 2
    assert "no step yet" in capsys.readouterr().err
