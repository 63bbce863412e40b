"""A needle in a haystack: one sentence with a number, hidden at a depth of a long text, is asked for (report, 4.3).

In: lengths in tokens, depths as shares, a text to hide it in (by default sentences made here, which say nothing). Out:
`Item`s, a cell of the map each, and the map as SVG.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from fireflyer.errors import UserError
from fireflyer.evaluate.problems import Item
from fireflyer.text.tokenizer import Tokenizer

DEPTHS = 5
_PLACES = ("Lisbon", "Nairobi", "Osaka", "Quito", "Tromsø", "Utrecht", "Valencia", "Warsaw")
_NEEDLE = "The secret number of {place} is {number}."
_ASKED = {
    "plain": "\n\nThe secret number of {place} is",
    "chat": "\n\nWhat is the secret number of {place}? Answer with the number alone.",
}
_WHO = ("The gardener", "A neighbour", "The old teacher", "My cousin", "The ferryman", "Her brother", "A traveller")
_DID = ("walked along", "talked about", "looked for", "painted", "remembered", "passed by", "wrote about")
_WHAT = ("the river", "the market", "a quiet street", "the stone bridge", "an empty house", "the hills", "the harbour")
_WHEN = ("in the morning", "before dinner", "without haste", "as the rain began", "on the way home", "late in autumn")


def needle_items(
    tokenizer: Tokenizer, way: str, lengths: Sequence[int], haystack: Path | None, seed: int, depths: int = DEPTHS
) -> list[Item]:
    """One for each length and depth, from the beginning (0) to the end (1) of the text; prompts of about that length.

    Raises UserError for a text that is too short.
    """
    items = []
    for length in lengths:
        for step in range(depths):
            draw = random.Random(f"{seed} {length} {step}")
            place, number = draw.choice(_PLACES), str(draw.randrange(10_000, 100_000))
            needle = _NEEDLE.format(place=place, number=number)
            asked = _ASKED[way].format(place=place)
            room = length - len(tokenizer.encode(needle + asked)) - 16  # the template's own marks
            sentences = _sentences(tokenizer, room, haystack, draw)
            depth = step / (depths - 1)
            sentences.insert(round(depth * len(sentences)), needle)
            problem = {"answer": number, "length": length, "depth": depth}
            items.append(Item(f"{length} tokens, depth {depth:.0%}", " ".join(sentences) + asked, problem))
    return items


def needle_map(items: Sequence[Item], records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Length, depth and the share of right answers of each cell."""
    cells = []
    for record in records:
        problem = items[record["number"]].problem
        right = [float(sample["correct"]) for sample in record["samples"]]
        cells.append({"length": problem["length"], "depth": problem["depth"], "found": sum(right) / len(right)})
    return cells


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
        candidates = iter(lambda: " ".join(draw.choice(part) for part in (_WHO, _DID, _WHAT, _WHEN)) + ".", None)
    else:
        try:
            text = haystack.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{haystack}: {error}") from None
        candidates = iter(f"{sentence.strip()}." for sentence in text.split(".") if sentence.strip())
    found: list[str] = []
    used = 0
    for sentence in candidates:
        used += len(tokenizer.encode(" " + sentence))
        if used > room:
            return found
        found.append(sentence)
    raise UserError(
        f"{haystack} has {used:,} tokens, fewer than the {room:,} of the longest haystack; give a longer text"
    )
