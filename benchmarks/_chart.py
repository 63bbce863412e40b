"""A line chart with logarithmic axes as SVG, written by hand: the same numbers give the same bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, log10

WIDTH, HEIGHT = 760, 440
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 30, 50, 50


@dataclass(frozen=True)
class Line:
    """(x, y) points under one name. hollow: those drawn as rings, by x. dashed: a line without marks."""

    name: str
    points: Sequence[tuple[float, float]]
    colour: str
    hollow: frozenset[float] = frozenset()
    dashed: bool = False


def log_chart(title: str, x_name: str, y_name: str, x_marks: Sequence[int], lines: Sequence[Line]) -> str:
    """The chart; both axes are logarithmic, x is marked where asked, y at 1, 2 and 5 times powers of ten, or at even
    steps where the values lie within a factor of ten."""
    xs = [x for line in lines for x, _ in line.points]
    ys = [y for line in lines for _, y in line.points]
    y_marks = _y_marks(min(ys), max(ys))
    low, high = log10(y_marks[0]), log10(y_marks[-1])

    def place(x: float, y: float) -> tuple[float, float]:
        across = (log10(x) - log10(min(xs))) / (log10(max(xs)) - log10(min(xs)))
        up = (log10(y) - low) / (high - low)
        return _LEFT + across * (WIDTH - _LEFT - _RIGHT), HEIGHT - _BOTTOM - up * (HEIGHT - _TOP - _BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{_LEFT}" y="22" font-size="15">{escape(title)}</text>',
        f'<text x="{(WIDTH + _LEFT) / 2:.0f}" y="{HEIGHT - 10}" text-anchor="middle">{escape(x_name)}</text>',
        f'<text x="16" y="{HEIGHT / 2:.0f}" text-anchor="middle" transform="rotate(-90 16 {HEIGHT / 2:.0f})">'
        f"{escape(y_name)}</text>",
    ]
    for y_mark in y_marks:
        _, y = place(min(xs), y_mark)
        parts.append(_rule(_LEFT, y, WIDTH - _RIGHT, y))
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{y_mark:g}</text>')
    for mark in x_marks:
        x, _ = place(mark, y_marks[0])
        text = f"{mark:,}" if mark < 1_000_000 else f"{mark:.0e}".replace("e+", "e")
        parts.append(_rule(x, _TOP, x, HEIGHT - _BOTTOM))
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - _BOTTOM + 16}" text-anchor="middle">{text}</text>')
    for index, line in enumerate(lines):
        parts += _drawn(line, [place(*point) for point in line.points])
        parts.append(f'<text x="{WIDTH - _RIGHT - 8}" y="{_TOP + 16 + 16 * index}" text-anchor="end" ')
        parts[-1] += f'fill="{line.colour}">{escape(line.name)}</text>'
    return "\n".join([*parts, "</svg>"]) + "\n"


def _y_marks(least: float, most: float) -> list[float]:
    """Where y is marked; the first and the last are the axis' ends."""
    if most >= 10 * least:
        low, high = floor(log10(least)), ceil(log10(most))
        return [*(factor * 10.0**power for power in range(low, high) for factor in (1, 2, 5)), 10.0**high]
    rough = max(most - least, least / 100) / 6
    unit = 10.0 ** floor(log10(rough))
    step = next(factor * unit for factor in (1, 2, 5, 10) if factor * unit >= rough)
    first, last = floor(least / step), ceil(most / step)
    first = max(first - (first == last), 1)
    return [step * count for count in range(first, last + 1)]


def _rule(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="#dddddd"/>'


def _drawn(line: Line, places: Sequence[tuple[float, float]]) -> list[str]:
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    dash = ' stroke-dasharray="5 4"' if line.dashed else ""
    drawn = [f'<polyline points="{path}" fill="none" stroke="{line.colour}" stroke-width="1.5"{dash}/>']
    for (x, _), (across, down) in zip(line.points, places, strict=True):
        if not line.dashed:
            fill = "white" if x in line.hollow else line.colour
            drawn.append(f'<circle cx="{across:.1f}" cy="{down:.1f}" r="4" fill="{fill}" stroke="{line.colour}"/>')
    return drawn
