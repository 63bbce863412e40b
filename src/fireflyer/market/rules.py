"""The rule book of mainland China's stocks and index futures, dated: what may be traded when, and what it costs.

In: symbols and dates. Out: limits, lots, fees and contract terms as they were on that date. Prices are in yuan, money
in fen (integers). Sources: the exchanges' trading rules (ChiNext's 20 % since 2020-08-24, STAR's own since 2019-07-22,
BSE since 2021-11-15), the Ministry of Finance's notice 2023 no. 39 (stamp duty halved on 2023-08-28), CFFEX's contract
tables. Not in it: listings' first days without a limit; ST shares, which no panel here marks; transfer fees.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from fireflyer.config.messages import shown
from fireflyer.errors import UserError
from fireflyer.market.panel import Dates, Floats

Board = Literal["main", "chinext", "star", "bse"]
BOARDS: tuple[Board, ...] = ("main", "chinext", "star", "bse")

_PREFIXES: tuple[tuple[str, Board], ...] = (
    ("688", "star"),
    ("689", "star"),
    ("300", "chinext"),
    ("301", "chinext"),
    ("60", "main"),
    ("000", "main"),
    ("001", "main"),
    ("002", "main"),
    ("003", "main"),
    ("00", "main"),
    ("8", "bse"),
    ("4", "bse"),
    ("92", "bse"),
)

_LIMITS: dict[Board, tuple[tuple[str, float], ...]] = {
    "main": (("1996-12-16", 0.10),),
    "chinext": (("2009-10-30", 0.10), ("2020-08-24", 0.20)),
    "star": (("2019-07-22", 0.20),),
    "bse": (("2021-11-15", 0.30),),
}
"""By board: from which date on, and the limit as a share of the reference price."""

_STAMP_DUTY = (("2008-09-19", 10), ("2023-08-28", 5))
"""On sales, in hundredths of a percent of the money."""

LOT = 100
STAR_LEAST = 200
"""STAR takes orders of 200 shares at least, then share by share."""

TICK = 0.01


def board_of(symbol: str) -> Board:
    """The board of "600000.XSHG". Raises UserError for a code of none."""
    for prefix, board in _PREFIXES:
        if symbol.startswith(prefix) and symbol[:6].isdigit():
            return board
    raise UserError(f"{shown(symbol)} is no code of an A-share: six digits and an exchange, as 600000.XSHG")


def limit_shares(symbols: tuple[str, ...], dates: Dates) -> Floats:
    """(D, N): the most that a price may move from its reference, as a share of it; NaN before a board had one."""
    boards = np.array([BOARDS.index(board_of(symbol)) for symbol in symbols])
    by_board = np.stack([_in_force(_LIMITS[board], dates) for board in BOARDS])
    return by_board[boards].T


def limit_prices(reference: Floats, share: Floats) -> tuple[Floats, Floats]:
    """The lowest and the highest price of a day, to the fen. reference: the last close, adjusted for ex-rights."""
    return np.round(reference * (1 - share) + 1e-9, 2), np.round(reference * (1 + share) + 1e-9, 2)


def stamp_duty_bp(date: np.datetime64) -> float:
    """Of the money of a sale."""
    return float(_in_force(_STAMP_DUTY, np.array([date]))[0])


def buyable(board: Board, shares: int) -> int:
    """How many of so many shares one order may buy: whole lots, on STAR 200 or more."""
    if board == "star":
        return shares if shares >= STAR_LEAST else 0
    return shares // LOT * LOT


def sellable(board: Board, shares: int, held: int) -> int:
    """How many of so many one order may sell of `held`: whole lots, or all that is left."""
    if shares >= held:
        return held
    if board == "star":
        return shares if shares >= STAR_LEAST else 0
    return shares // LOT * LOT


def _in_force(table: tuple[tuple[str, float], ...], dates: Dates) -> Floats:
    starts = np.array([start for start, _ in table], "datetime64[D]")
    values = np.array([np.nan, *(value for _, value in table)])
    return values[np.searchsorted(starts, dates, side="right")]


@dataclass(frozen=True)
class Fees:
    """commission_bp of the money and no less than minimum_fen, buying and selling; stamp duty as the date has it.

    stamp_duty_bp: where given it holds on every date, to see what another regime would have cost.
    """

    commission_bp: float = 2.5
    minimum_fen: int = 500
    stamp_duty_bp: float | None = None

    def of(self, money_fen: int, *, selling: bool, date: np.datetime64) -> int:
        """Fen; of no money none."""
        if money_fen <= 0:
            return 0
        commission = max(round_fen(money_fen * self.commission_bp / 10_000), self.minimum_fen)
        if not selling:
            return commission
        duty = stamp_duty_bp(date) if self.stamp_duty_bp is None else self.stamp_duty_bp
        return commission + round_fen(money_fen * duty / 10_000)


def round_fen(amount: float) -> int:
    """Half a fen upwards."""
    return int(np.floor(amount + 0.5))


# --- Index futures


@dataclass(frozen=True)
class Contract:
    """CFFEX's terms. multiplier: yuan a point; margin of the contract's value; fees as shares of the money.

    limit: of the previous settlement. Four contracts are listed: this month, the next, and two quarters' ends.
    """

    code: str
    multiplier: int
    tick: float
    margin: float
    limit: float
    open_fee: float
    close_fee: float
    close_today_fee: float

    def money_fen(self, points: float, count: int) -> int:
        """What so many contracts stand for."""
        return round_fen(points * self.multiplier * abs(count) * 100)

    def fee_fen(self, points: float, count: int, *, closing: bool = False, today: bool = False) -> float:
        """Of trading them, not yet rounded. today: they were opened on the same day."""
        share = self.open_fee if not closing else self.close_today_fee if today else self.close_fee
        return self.money_fen(points, count) * round(share * 1e7) / 1e7  # of integers, so that half a fen is one

    def margin_fen(self, points: float, count: int) -> int:
        """What holding so many contracts, long or short, ties up."""
        return round_fen(points * self.multiplier * abs(count) * self.margin * 100)


_LISTED: dict[str, tuple[str, int]] = {
    "IF": ("2010-04-16", 300),
    "IH": ("2015-04-16", 300),
    "IC": ("2015-04-16", 200),
    "IM": ("2022-07-22", 200),
}
"""Since when, and yuan a point."""

CODES = tuple(_LISTED)

_FEE = 0.253e-4
_TERMS: tuple[tuple[str, dict[str, float], float], ...] = (
    ("2010-04-16", {"IF": 0.12, "IH": 0.12, "IC": 0.12}, _FEE),
    ("2015-09-07", {"IF": 0.40, "IH": 0.40, "IC": 0.40}, 23e-4),
    ("2017-02-17", {"IF": 0.20, "IH": 0.20, "IC": 0.30}, 9.2e-4),
    ("2017-09-18", {"IF": 0.15, "IH": 0.15, "IC": 0.30}, 6.9e-4),
    ("2018-12-03", {"IF": 0.12, "IH": 0.12, "IC": 0.15}, 4.6e-4),
    ("2019-04-22", {"IF": 0.12, "IH": 0.12, "IC": 0.14, "IM": 0.15}, 3.45e-4),
    ("2023-03-20", {"IF": 0.12, "IH": 0.12, "IC": 0.14, "IM": 0.15}, 2.53e-4),
)
"""From which date on: margins, and the fee for closing on the day. Those of January 2017 and of today are a recorded
contract table's and its trade's; the steps between are as commonly told, not checked against the exchange's notices."""

_TERM_DATES = np.array([start for start, _, _ in _TERMS], "datetime64[D]")


def contract_on(code: str, date: np.datetime64) -> Contract:
    """The terms of that day. Raises UserError before the contract was listed."""
    listed, multiplier = _LISTED[code]
    if date < np.datetime64(listed):
        raise UserError(f"{code} futures are traded since {listed}, {date} lies before; give another future")
    _, margins, close_today = _TERMS[int(np.searchsorted(_TERM_DATES, date, side="right")) - 1]
    return Contract(code, multiplier, 0.2, margins[code], 0.10, _FEE, _FEE, close_today)


def third_friday(month: str) -> np.datetime64:
    """Of "2024-06": a contract's last trading day, if it is a session."""
    return np.busday_offset(np.datetime64(f"{month}-01", "D"), 2, roll="forward", weekmask="Fri")


def last_trading_day(month: str, sessions: Dates) -> np.datetime64:
    """The third Friday of "2024-06", or the session after where that is none. UserError past the sessions' end."""
    friday = third_friday(month)
    place = int(np.searchsorted(sessions, friday))
    if place == len(sessions):
        raise UserError(f"the sessions end on {sessions[-1]}, before {month}'s contract does on {friday}")
    return sessions[place]


def listed_months(date: np.datetime64) -> list[str]:
    """The four contracts of a date, by month: this and the next, and the next two of March, June, September, December.

    On the day after the last trading day the month is over; the caller says so by giving the next month's first day.
    """
    month = date.astype("datetime64[M]")
    near = [month, month + 1]
    far = [m for m in (month + ahead for ahead in range(2, 12)) if m.astype(int) % 12 % 3 == 2][:2]
    return [str(m) for m in (*near, *far)]


def quoted(points: float, contract: Contract) -> float:
    """The nearest price that may be quoted."""
    return round(round(points / contract.tick) * contract.tick, 6)
