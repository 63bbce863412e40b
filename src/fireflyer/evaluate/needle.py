"""A needle in a haystack: one sentence with two words, hidden at a depth of a long text, is asked for (report, 4.3).

In: lengths in tokens, depths as shares, a text to hide it in (by default sentences made here, which say nothing). Out:
`Item`s, a cell of the map each, and the map as SVG.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from html import escape
from itertools import product
from pathlib import Path
from typing import Any

from fireflyer.data.needles import NEEDLE, PLACES, QUESTION, secret_words, sentence
from fireflyer.errors import UserError
from fireflyer.evaluate.problems import Item
from fireflyer.text.tokenizer import Tokenizer

DEPTHS = 5
_ASKED = {
    "plain": QUESTION,
    "chat": "\n\nWhat are the secret words of {place}? Answer with the two words alone.",
}


def needle_items(
    tokenizer: Tokenizer,
    way: str,
    lengths: Sequence[int],
    haystack: Path | None,
    seed: int,
    each: int = 1,
    depths: int = DEPTHS,
) -> list[Item]:
    """`each` for each length and depth, from the beginning (0) to the end (1) of the text; prompts are about as long.

    Raises UserError for a text that is too short.
    """
    items = []
    for length, step, number in product(lengths, range(depths), range(each)):
        draw = random.Random(f"{seed} {length} {step} {number}")
        place, secret = draw.choice(PLACES), secret_words(draw.getrandbits(32))
        needle = NEEDLE.format(place=place, words=secret)
        asked = _ASKED[way].format(place=place)
        room = length - len(tokenizer.encode(needle + asked)) - 16  # the template's own marks
        sentences = _sentences(tokenizer, room, haystack, draw)
        depth = step / (depths - 1)
        sentences.insert(round(depth * len(sentences)), needle)
        problem = {"answer": secret, "length": length, "depth": depth}
        items.append(Item(f"{length} tokens, depth {depth:.0%}, {number}", " ".join(sentences) + asked, problem))
    return items


def needle_map(items: Sequence[Item], records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Length, depth and the share of right answers of each cell."""
    right: dict[tuple[int, float], list[float]] = {}
    for record in records:
        problem = items[record["number"]].problem
        cell = right.setdefault((problem["length"], problem["depth"]), [])
        cell += [float(sample["correct"]) for sample in record["samples"]]
    return [
        {"length": length, "depth": depth, "found": sum(found) / len(found)}
        for (length, depth), found in sorted(right.items())
    ]


def needle_svg(cells: Sequence[Mapping[str, Any]], title: str) -> str:
    """The map: lengths from left to right, depths from top to bottom, green where the needle was found."""
    lengths = sorted({cell["length"] for cell in cells})
    depths = sorted({cell["depth"] for cell in cells})
    wide, high, left, top = 64, 32, 64, 48
    width, height = left + wide * len(lengths) + 16, top + high * len(depths) + 40
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{left}" y="24">{escape(title)}</text>',
    ]
    for cell in cells:
        column, row = lengths.index(cell["length"]), depths.index(cell["depth"])
        hue = round(120 * cell["found"])
        x, y = left + wide * column, top + high * row
        lines.append(
            f'<rect x="{x}" y="{y}" width="{wide - 2}" height="{high - 2}" fill="hsl({hue},60%,55%)"/>'
            f'<text x="{x + wide // 2}" y="{y + 20}" text-anchor="middle">{cell["found"]:.0%}</text>'
        )
    for row, depth in enumerate(depths):
        lines.append(f'<text x="{left - 8}" y="{top + high * row + 20}" text-anchor="end">{depth:.0%}</text>')
    for column, length in enumerate(lengths):
        x, y = left + wide * column + wide // 2, top + high * len(depths) + 20
        lines.append(f'<text x="{x}" y="{y}" text-anchor="middle">{length:,}</text>')
    return "\n".join([*lines, "</svg>"]) + "\n"


def _sentences(tokenizer: Tokenizer, room: int, haystack: Path | None, draw: random.Random) -> list[str]:
    """As many as fit into this many tokens."""
    if haystack is None:
        candidates = iter(lambda: sentence(draw.getrandbits(32)), None)
    else:
        try:
            text = haystack.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{haystack}: {error}") from None
        candidates = iter(f"{part.strip()}." for part in text.split(".") if part.strip())
    found: list[str] = []
    used = 0
    for candidate in candidates:
        used += len(tokenizer.encode(" " + candidate))
        if used > room:
            return found
        found.append(candidate)
    raise UserError(
        f"{haystack} has {used:,} tokens, fewer than the {room:,} of the longest haystack; give a longer text"
    )
