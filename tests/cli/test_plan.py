"""`fireflyer plan`: the keys that programs read, the published figures, and every refusal as one line with code 2."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fireflyer.cli.main import main


def _facts(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["plan", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_given_hours_the_published_sums_come_out(capsys: pytest.CaptureFixture[str]):
    facts = _facts(capsys, "deepseek-v3", "--hours-per-trillion", "180000")
    assert facts["train"]["gflop_per_token"] == pytest.approx(250.5, rel=0.005)
    assert facts["train"]["mtp_gflop_per_token"] == pytest.approx(10.19, rel=0.005)
    assert facts["train"]["device_hours"] == pytest.approx(2_664_000)
    assert facts["total"]["device_hours"] == pytest.approx(2_788_000)
    assert facts["total"]["usd"] == pytest.approx(5_576_000)


def test_predicted_hours_are_those_of_the_run_within_ten_percent(capsys: pytest.CaptureFixture[str]):
    facts = _facts(capsys, "deepseek-v3", "--gpu", "H800", "--count", "2048", "--tokens", "14.8T")
    assert facts["train"]["device_hours"] == pytest.approx(2_664_000, rel=0.10)
    assert facts["train"]["usd"] == pytest.approx(2 * facts["train"]["device_hours"])
    assert facts["train"]["days"] == pytest.approx(facts["train"]["device_hours"] / 2048 / 24)
    assert facts["train"]["tokens_per_s"] * facts["train"]["days"] * 86400 == pytest.approx(14.8e12)
    assert 0 < facts["memory_per_rank_bytes"] < 84.94e9
    assert facts["memory_per_rank_bytes"] == pytest.approx(sum(facts["memory"].values()), abs=5)
    layout = facts["layout"]
    assert layout["pp"] * layout["dp"] * layout["cp"] == 2048


def test_a_layout_by_hand_and_its_text(capsys: pytest.CaptureFixture[str]):
    by_hand = "--pp 16 --dp 128 --ep 64 --zero 1 --micro-batch 1 --schedule dualpipe --recompute selective".split()
    facts = _facts(capsys, "deepseek-v3", *by_hand)
    assert (facts["layout"]["pp"], facts["layout"]["ep"], facts["layout"]["schedule"]) == (16, 64, "dualpipe")
    assert main(["plan", "deepseek-v3", *by_hand]) == 0
    text = capsys.readouterr().out
    assert "pp 16, dp 128, ep 64, zero 1, micro-batch 1, dualpipe, recompute selective" in text
    assert f"{facts['train']['device_hours']:,.0f} device hours, ${facts['train']['usd']:,.0f}" in text
    assert max(len(line) for line in text.splitlines()) <= 120


def test_serving(capsys: pytest.CaptureFixture[str]):
    facts = _facts(capsys, "deepseek-v3", "--serve", "--prefill-unit", "32", "--decode-unit", "144")
    serve = facts["serve"]
    assert (serve["prefill"]["gpus"], serve["decode"]["gpus"]) == (32, 144)
    assert (serve["prefill"]["experts_per_gpu"], serve["decode"]["experts_per_gpu"]) == (9, 2)
    per_second = 8 * 2.0 / 3600
    for kind, node in (("input", "prefill"), ("output", "decode")):
        speed = serve[f"{node}_tokens_per_s_per_node"]
        assert serve[f"usd_per_million_{kind}_tokens"] == pytest.approx(1e6 / speed * per_second)
    mixed = (4096 * serve["usd_per_million_input_tokens"] + 1024 * serve["usd_per_million_output_tokens"]) / 5120
    assert serve["usd_per_million_tokens"] == pytest.approx(mixed)
    assert serve["batch"] * (4096 + 512) * 70_272 == pytest.approx(serve["cache_bytes"])
    assert serve["tokens_per_s_per_user"] >= 20
    assert main(["plan", "deepseek-v3", "--serve"]) == 0
    assert max(len(line) for line in capsys.readouterr().out.splitlines()) <= 100


def test_a_card_without_a_price_has_none(capsys: pytest.CaptureFixture[str]):
    assert _facts(capsys, "deepseek-v2-lite", "--gpu", "H200", "--count", "8")["train"]["usd"] is None
    assert _facts(capsys, "deepseek-v2-lite", "--gpu", "H200", "--serve")["serve"]["usd_per_million_tokens"] is None
    facts = _facts(capsys, "deepseek-v2-lite", "--gpu", "H200", "--count", "8", "--usd-per-hour", "3")
    assert facts["train"]["usd"] == pytest.approx(3 * facts["train"]["device_hours"])
    assert main(["plan", "deepseek-v2-lite", "--gpu", "H200", "--count", "8"]) == 0
    assert "give --usd-per-hour" in capsys.readouterr().out


def test_cards_of_ones_own_and_the_sources(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "mine.toml"
    path.write_text("[gpu.H800]\nusd_per_hour = 1.0\n")
    facts = _facts(capsys, "deepseek-v2-lite", "--hardware", str(path), "--count", "8")
    assert facts["gpu"]["usd_per_hour"] == 1.0
    assert facts["train"]["usd"] == pytest.approx(facts["train"]["device_hours"])
    assert main(["plan", "--sources"]) == 0
    text = capsys.readouterr().out
    assert "looked up on 20" in text
    assert "deepseek-ai/DeepEP" in text
    assert _facts(capsys, "--sources")["sources"]["gpu.H800.sms"]


def test_a_recipe_brings_its_batch_length_and_tokens(capsys: pytest.CaptureFixture[str]):
    facts = _facts(capsys, "ember", "--count", "2")
    assert (facts["train"]["global_batch"], facts["train"]["seq_len"]) == (16, 256)
    assert facts["train"]["tokens"] == 600 * 16 * 256
    facts = _facts(capsys, "ember", "--count", "2", "--seq-len", "128", "--global-batch", "8", "--tokens", "1M")
    assert (facts["train"]["global_batch"], facts["train"]["seq_len"], facts["train"]["tokens"]) == (8, 128, 1_000_000)


@pytest.mark.parametrize("recipe", ["ember", "spark"])
def test_a_small_run_is_told_in_small_units(recipe: str, capsys: pytest.CaptureFixture[str]):
    assert main(["plan", recipe]) == 0
    text = capsys.readouterr().out
    assert "MB" in text
    assert "seconds" in text
    assert "$0," not in text
    assert " 0 device hours" not in text


def test_a_card_without_fp8_is_planned_in_bf16(capsys: pytest.CaptureFixture[str]):
    assert _facts(capsys, "deepseek-v2-lite", "--gpu", "A100", "--count", "8")["train"]["precision"] == "bf16"
    assert _facts(capsys, "deepseek-v2-lite", "--gpu", "H100", "--count", "8")["train"]["precision"] == "fp8"


@pytest.mark.parametrize("recipe", ["spark", "ember", "moonlight"])
def test_recipes_and_small_models(recipe: str, capsys: pytest.CaptureFixture[str]):
    facts = _facts(capsys, recipe, "--count", "8", "--tokens", "20M", "--global-batch", "64")
    assert facts["train"]["tokens"] == 20_000_000
    assert facts["train"]["seq_len"] <= 4096


REFUSED = [
    ("deepseek-v3 --gpu H80", "did you mean H800?"),
    ("deepseek-v3 --gpu A100 --precision fp8", "give bf16"),
    ("deepseek-v3 --pp 15", "--pp 15 doesn't divide --count 2,048; give 8 or 16"),
    ("deepseek-v3 --ep 48", "give 32 or 64"),
    ("deepseek-v3 --count 16", "the nearest that fits is --count 128"),
    ("deepseek-v3 --serve --count 8", "the nearest that fits is --count 16"),
    ("deepseek-v3 --serve --decode-unit 8", "the nearest that fits is --decode-unit 16"),
    ("deepseek-v3 --serve --decode-unit 512", "give --count 512"),
    ("deepseek-v3 --tokens many", "'many'"),
    ("deepseek-v3 --count 0", "--count"),
    ("deepseek-v3 --hours-per-trillion 0", "isn't a number above 0"),
    ("deepseek-v3 --usd-per-hour -1", "isn't a number of 0 or more"),
    ("deepseek-v3 --count 1000003", "sequences can't be shared out on 1,000,003 GPUs"),
    ("deepseek-v3 --cache-hits 1.5", "isn't a share"),
    ("moonlight --serve --mtp-acceptance 0.8", "moonlight has no MTP module"),
    ("deepseek-v33", "did you mean deepseek-v3"),
    ("deepseek-v3 --schedule gpipe", "--schedule"),
    ("", "no CONFIG given"),
]


@pytest.mark.parametrize(("line", "said"), REFUSED)
def test_refused_in_one_line(line: str, said: str, capsys: pytest.CaptureFixture[str]):
    assert main(["plan", *line.split()]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert said in printed.err
    assert printed.err.count("\n") == 1


def test_loads_no_torch():
    check = (
        "import sys\nfrom fireflyer.cli.main import main\n"
        "assert main(['plan', 'deepseek-v3', '--pp', '16']) == 0 == main(['plan', 'deepseek-v3', '--serve'])\n"
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
