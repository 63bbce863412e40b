"""What was asked of the market and what came of it: orders, fills and rejections, futures, and one hash over them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Reason = Literal[
    "suspended",
    "at the upper limit",
    "at the lower limit",
    "less than one lot",
    "not enough cash",
    "bought today",
]


@dataclass(frozen=True)
class Order:
    """Made at the close of `signal_row`; shares above 0 buy. Rows are of the panel's dates."""

    symbol: str
    shares: int
    signal_row: int


@dataclass(frozen=True)
class Fill:
    """shares above 0 were bought. price in yuan, money and fees in fen. forced: a name that no longer traded was given
    up at its last price."""

    symbol: str
    shares: int
    price: float
    money_fen: int
    fee_fen: int
    signal_row: int
    fill_row: int
    forced: bool = False


@dataclass(frozen=True)
class Rejection:
    """An order, or the rest of one, that could not be filled on its day; it is not carried over."""

    symbol: str
    shares: int
    signal_row: int
    fill_row: int
    reason: Reason


@dataclass(frozen=True)
class FutureTrade:
    """Index contracts, as "IC2402", bought or (below 0) sold, decided a session before; refused: none were, and why."""

    contract: str
    count: int
    points: float
    fee_fen: int
    fill_row: int
    refused: Reason | None = None


def order_hash(orders: Iterable[Order], futures: Iterable[FutureTrade] = ()) -> str:
    """SHA-256 over the orders in their order, then the futures': equal for equal decisions, in any process."""
    digest = hashlib.sha256()
    for order in orders:
        digest.update(f"{order.signal_row} {order.symbol} {order.shares}\n".encode())
    for trade in futures:
        digest.update(f"{trade.fill_row} {trade.contract} {trade.count}\n".encode())
    return digest.hexdigest()
