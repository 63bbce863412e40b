"""The table of hardware: every number has a source, measured rates come back as measured, users' files are checked."""

from dataclasses import asdict
from pathlib import Path

import pytest

from fireflyer.config.files import read_toml
from fireflyer.cost.hardware import TABLE, load_hardware
from fireflyer.errors import UserError

SHIPPED = load_hardware()


def test_every_number_has_its_source():
    table = read_toml(TABLE)
    for name, card in table["gpu"].items():
        assert set(card) - {"sources"} == set(card["sources"]), name
    for part in ("kernels", "all_to_all"):
        assert set(table[part]) - {"sources"} == set(table[part]["sources"])
    known = set(table["source"])
    assert all(rates["source"] in known and rates["measured_on"] in table["gpu"] for rates in table["products"])
    assert len(SHIPPED.date.split("-")) == 3
    for gpu in SHIPPED.gpus.values():
        for key, value in asdict(gpu).items():
            assert key == "name" or value is None or SHIPPED.sources[f"gpu.{gpu.name}.{key}"]


def test_measured_products_come_back_as_measured():
    """Seconds of each shape give the published TFLOPS again, on as many multiprocessors."""
    gpu = SHIPPED.gpu("H800")
    count = 0
    for rates in read_toml(TABLE)["products"]:
        for *shape, tflops in rates["measured"]:
            rows, columns, depth, groups = shape
            seconds = SHIPPED.product_seconds(gpu, "fp8", rates["pass"], (*shape,), rates["sms"] / 132)
            assert 2 * rows * columns * depth * groups / seconds / 1e12 == pytest.approx(tflops, rel=1e-9), shape
            count += 1
    assert count > 40
    assert all(0 < product.share <= 1 for products in SHIPPED.products.values() for product in products)


def test_bf16_reaches_what_was_measured_and_memory_limits_thin_products():
    gpu = SHIPPED.gpu("H800")
    large = (8192, 8192, 8192, 1)
    rate = 2 * 8192**3 / SHIPPED.product_seconds(gpu, "bf16", "forward", large)
    assert rate == pytest.approx(794.5e12)
    thin = (1, 8192, 8192, 1)
    seconds = SHIPPED.product_seconds(gpu, "bf16", "forward", thin)
    assert seconds >= 2 * 8192 * 8192 / 3350e9  # the weights must be read


def test_weight_gradients_of_few_rows_are_bound_by_their_fp32_sums():
    gpu = SHIPPED.gpu("H800")
    few, many = ((4096, 7168, rows, 4) for rows in (1024, 8192))
    times = [SHIPPED.product_seconds(gpu, "fp8", "weight_gradient", shape) for shape in (few, many)]
    assert times[0] > times[1] / 8 * 1.5
    assert times[0] >= 4 * 8 * 4096 * 7168 / 3350e9


def test_another_card_has_the_same_share_of_its_own_limits():
    shape = (4096, 7168, 16384, 1)
    h800, b200 = (SHIPPED.product_seconds(SHIPPED.gpu(name), "fp8", "forward", shape) for name in ("H800", "b200"))
    assert h800 / b200 == pytest.approx(4500 / 1979)


def test_an_unknown_card_names_the_nearest():
    with pytest.raises(UserError, match=r"--gpu 'H80': no such card; did you mean H800\?.*--hardware FILE"):
        SHIPPED.gpu("H80")
    with pytest.raises(UserError, match="A100 has no FP8 products; give bf16"):
        SHIPPED.gpu("a100").peak("fp8")


def test_a_users_file_adds_and_changes_cards(tmp_path: Path):
    path = tmp_path / "mine.toml"
    card = "\n".join(f"{key} = 7" for key in asdict(SHIPPED.gpu("H800")) if key not in ("name", "usd_per_hour"))
    path.write_text(f"[gpu.H800]\nusd_per_hour = 1.5\n[gpu.Mine]\n{card}\nsources = {{ sms = 'counted' }}\n")
    hardware = load_hardware(path)
    assert hardware.gpu("H800").usd_per_hour == 1.5
    assert hardware.gpu("H800").sms == 132
    assert hardware.gpu("mine").sms == 7
    assert hardware.gpu("mine").usd_per_hour is None
    assert hardware.sources["gpu.Mine.sms"] == "counted"
    assert hardware.sources["gpu.Mine.memory_gb"] == hardware.sources["gpu.H800.usd_per_hour"] == str(path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[gpu.H800]\nsmss = 3", "unknown key smss; did you mean sms"),
        ("[gpu.H800]\nsms = -3", r"gpu.H800.sms = -3 isn't a number above 0"),
        ("[gpu.H800]\nmemory_gb = 'a lot'", "isn't a number"),
        ("[gpu.New]\nsms = 3", "memory_gb is missing"),
        ("cards = 3", r"give tables \[gpu.NAME\]"),
        ("[gpu", "broken TOML"),
    ],
)
def test_a_bad_file_is_refused(text: str, said: str, tmp_path: Path):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(UserError, match=said):
        load_hardware(path)
