"""Cards, links and what kernels reach on them: hardware.toml, dated and cited, which users extend. No torch.

In: the shipped table and, where given, a user's file in the same form. Out: `Hardware`, whose cards and rates answer in
SI units (bytes, operations, seconds). A rate measured on one card holds on another as the same share of its roofline,
min(peak, operations per byte x memory bandwidth), of the multiprocessors used.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import lru_cache
from math import log
from pathlib import Path
from typing import Any

from fireflyer.config.files import read_toml
from fireflyer.config.messages import nearest, shown
from fireflyer.errors import UserError

TABLE = Path(__file__).with_name("hardware.toml")
PRECISIONS = ("fp8", "bf16")


@dataclass(frozen=True)
class Gpu:
    """One card and its links. Bandwidths are those of one direction; `usd_per_hour` None: no price with a source."""

    name: str
    memory_gb: float
    memory_gb_per_s: float
    bf16_tflops: float
    fp8_tflops: float
    bf16_matmul_tflops: float
    sms: int
    gpus_per_node: int
    nvlink_gb_per_s: float
    network_gb_per_s: float
    usd_per_hour: float | None = None

    def peak(self, precision: str) -> float:
        """Dense operations per second. Raises UserError where the card has no such products."""
        peak = {"bf16": self.bf16_tflops, "fp8": self.fp8_tflops}[precision]
        if not peak:
            raise UserError(f"--precision {precision}: {self.name} has no {precision.upper()} products; give bf16")
        return peak * 1e12


@dataclass(frozen=True)
class Product:
    """One measured matrix product: rows a group, columns, depth, groups; `share` is its part of the roofline."""

    shape: tuple[int, int, int, int]
    share: float


@dataclass(frozen=True)
class Kernels:
    """What the other kernels reach, as shares of a card's limits where they are rates. See hardware.toml."""

    communication_sms: int
    attention_forward: float
    attention_backward: float
    elementwise_bytes: float
    compute_busy: float
    decode_attention: float
    decode_attention_memory: float


@dataclass(frozen=True)
class AllToAll:
    """(dispatch, combine) by number of GPUs: shares of a link's bandwidth.

    `low_latency_us`: microseconds of the low-latency form, over links of `measured_nvlink` and `measured_network` GB/s.
    """

    nvlink: dict[int, tuple[float, float]]
    network: dict[int, tuple[float, float]]
    low_latency_us: dict[int, tuple[float, float]]
    low_latency_tokens: int
    measured_nvlink: float
    measured_network: float


@dataclass(frozen=True)
class Hardware:
    """The whole table; `sources` has the words beside every number, as `gpu.H800.sms`."""

    date: str
    gpus: dict[str, Gpu]
    kernels: Kernels
    all_to_all: AllToAll
    products: dict[str, tuple[Product, ...]]
    sources: dict[str, str]

    def gpu(self, name: str) -> Gpu:
        """The card of that name, whatever its case. Raises UserError with the nearest names."""
        by_lower = {known.lower(): gpu for known, gpu in self.gpus.items()}
        if name.lower() in by_lower:
            return by_lower[name.lower()]
        guess = nearest(name.lower(), by_lower)
        meant = f"; did you mean {by_lower[guess].name}?" if guess else "."
        known = ", ".join(self.gpus)
        raise UserError(f"--gpu {shown(name)}: no such card{meant} Known: {known}; --hardware FILE adds others")

    def product_seconds(
        self, gpu: Gpu, precision: str, direction: str, shape: tuple[int, int, int, int], sms_share: float = 1.0
    ) -> float:
        """Seconds of one (grouped) product: `groups` times (rows, depth) by (depth, columns).

        FP8 has the share of the roofline that the nearest shape reached in the measurements of that direction; BF16 the
        best share measured on the card at any shape. `sms_share` of the multiprocessors work on it.
        """
        rows, columns, depth, groups = shape
        if not rows:
            return 0.0
        operations = 2.0 * rows * columns * depth * groups
        size = {"fp8": 1, "bf16": 2}[precision]
        moved = groups * _moved(direction, (rows, columns, depth), size)
        limit = min(gpu.peak(precision) * sms_share, operations / moved * gpu.memory_gb_per_s * 1e9)
        if precision == "bf16":
            return operations / (limit * gpu.bf16_matmul_tflops / gpu.bf16_tflops)
        return operations / (limit * _share(self.products[direction], shape))


def _moved(direction: str, shape: tuple[int, int, int], size: int) -> float:
    """Bytes that one product must read and write: weight gradients are added to in FP32, other results are BF16."""
    rows, columns, depth = shape
    return size * depth * (rows + columns) + (8.0 if direction == "weight_gradient" else 2.0) * rows * columns


@lru_cache(maxsize=65536)
def _share(measured: tuple[Product, ...], shape: tuple[int, int, int, int]) -> float:
    """That of the measured product with the nearest sizes, by ratio; grouped products stand for grouped ones."""
    alike = [p for p in measured if (p.shape[3] > 1) == (shape[3] > 1)] or list(measured)

    def distance(product: Product) -> float:
        return sum(log(a / b) ** 2 for a, b in zip(product.shape[:3], shape[:3], strict=True))

    return min(alike, key=distance).share


def load_hardware(extra: str | Path | None = None) -> Hardware:
    """The shipped table, with a user's file over it. Raises UserError for a key or a value that isn't understood."""
    table = read_toml(TABLE)
    cards = {name: dict(card) for name, card in table["gpu"].items()}
    sources = {f"[{short}]": said for short, said in table["source"].items()}
    for name, card in cards.items():
        sources.update({f"gpu.{name}.{key}": said for key, said in card.pop("sources").items()})
    if extra is not None:
        for name, card in _users_cards(Path(extra)).items():
            card = dict(card)
            said = card.pop("sources", {})
            cards[name] = {**cards.get(name, {}), **card}
            sources.update({f"gpu.{name}.{key}": said.get(key, str(extra)) for key in card})
    gpus = {name: _gpu(name, card, str(extra)) for name, card in cards.items()}
    for part in ("kernels", "all_to_all"):
        sources.update({f"{part}.{key}": said for key, said in table[part]["sources"].items()})
    for rates in table["products"]:
        sources[f"products.{rates['pass']}"] = rates["source"]
    return Hardware(
        date=table["date"],
        gpus=gpus,
        kernels=_kernels(table["kernels"], gpus),
        all_to_all=_all_to_all(table["all_to_all"], gpus),
        products=_products(table["products"], gpus),
        sources=sources,
    )


def _users_cards(path: Path) -> dict[str, dict[str, Any]]:
    table = read_toml(path)
    cards = table.pop("gpu", None)
    if table or not isinstance(cards, dict) or not all(isinstance(card, dict) for card in cards.values()):
        raise UserError(
            f"{path}: holds {shown(sorted(table) or cards)}; give tables [gpu.NAME] with the card's numbers"
        )
    return cards


_KEYS = [field.name for field in fields(Gpu) if field.name != "name"]


def _gpu(name: str, card: dict[str, Any], source: str) -> Gpu:
    for key, value in card.items():
        if key not in _KEYS:
            guess = nearest(key, _KEYS)
            raise UserError(f"{source}: gpu.{name}: unknown key {key}" + (f"; did you mean {guess}?" if guess else ""))
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        least = 0.0 if key in ("fp8_tflops", "usd_per_hour") else 1e-9
        if not number or not least <= value < float("inf"):
            raise UserError(f"{source}: gpu.{name}.{key} = {shown(value)} isn't a number above 0; mend it")
    if missing := [key for key in _KEYS if key not in card and key != "usd_per_hour"]:
        raise UserError(f"{source}: gpu.{name}: {missing[0]} is missing; a new card needs {', '.join(_KEYS[:-1])}")
    return Gpu(name=name, **card)


def _kernels(table: dict[str, Any], gpus: dict[str, Gpu]) -> Kernels:
    gpu = gpus[table["measured_on"]]
    limit = gpu.peak("bf16") * table["attention_sms"] / gpu.sms
    return Kernels(
        communication_sms=table["communication_sms"],
        attention_forward=table["attention_forward_tflops"] * 1e12 / limit,
        attention_backward=table["attention_backward_tflops"] * 1e12 / limit,
        elementwise_bytes=table["elementwise_bytes"],
        compute_busy=table["compute_busy"],
        decode_attention=table["decode_attention_tflops"] * 1e12 / gpu.peak("bf16"),
        decode_attention_memory=table["decode_attention_gb_per_s"] / gpu.memory_gb_per_s,
    )


def _all_to_all(table: dict[str, Any], gpus: dict[str, Gpu]) -> AllToAll:
    gpu = gpus[table["measured_on"]]

    def shares(rates: dict[str, list[float]], link: float) -> dict[int, tuple[float, float]]:
        return {int(count): (dispatch / link, combine / link) for count, (dispatch, combine) in rates.items()}

    return AllToAll(
        nvlink=shares(table["nvlink"], gpu.nvlink_gb_per_s),
        network=shares(table["network"], gpu.network_gb_per_s),
        low_latency_us=shares(table["low_latency_us"], 1.0),
        low_latency_tokens=table["low_latency_tokens"],
        measured_nvlink=gpu.nvlink_gb_per_s,
        measured_network=gpu.network_gb_per_s,
    )


def _products(tables: list[dict[str, Any]], gpus: dict[str, Gpu]) -> dict[str, tuple[Product, ...]]:
    found: dict[str, list[Product]] = {}
    for table in tables:
        gpu = gpus[table["measured_on"]]
        for rows, columns, depth, groups, tflops in table["measured"]:
            moved = _moved(table["pass"], (rows, columns, depth), 1)
            limit = min(
                gpu.peak("fp8") * table["sms"] / gpu.sms,
                2.0 * rows * columns * depth / moved * gpu.memory_gb_per_s * 1e9,
            )
            found.setdefault(table["pass"], []).append(Product((rows, columns, depth, groups), tflops * 1e12 / limit))
    return {direction: tuple(products) for direction, products in found.items()}
