"""What a text's answer is: the number, letter, formula or code that it settles on. Plain functions of text."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation

from fireflyer.text.special_tokens import THINK_BEGIN, THINK_END

_NUMBER = r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|-?\.\d+"
_MARKED = re.compile(r"####\s*\$?\s*(" + _NUMBER + ")")
_ANY = re.compile(r"(?<![\w.])(?:" + _NUMBER + r")(?![\d])")
_CHOICE = re.compile(
    r"(?:answer|choice|option)(?:\s+(?:is|would\s+be))?\s*[:=]?\s*(?:\*\*|\$|\\boxed\{|\\text\{)*\s*\(?([A-J])\b(?!')",
    re.IGNORECASE,
)
_FENCE = re.compile(r"```[ \t]*(?P<language>\w*)[^\n]*\n(?P<code>.*?)(?:\n```|\Z)", re.DOTALL)


def without_thinking(text: str) -> str | None:
    """What comes after the thinking; None where thinking was begun and never ended."""
    _, mark, after = text.rpartition(THINK_END)
    if mark:
        return after
    return None if THINK_BEGIN in text else text


def last_line(text: str) -> str:
    """The last line that isn't blank, without spaces around."""
    return text.strip().rpartition("\n")[2].strip()


def boxed(text: str) -> str | None:
    """The inside of the last \\boxed{...} or \\fbox{...}, whose braces match; None where there is none."""
    begin = max(text.rfind("\\boxed{"), text.rfind("\\fbox{"))
    if begin < 0:
        return None
    start = text.index("{", begin) + 1
    depth = 1
    for place in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if depth == 0:
            return text[start:place].strip()
    return None


def last_number(text: str) -> str | None:
    """The number that a text settles on: after its last ####, else in its last \\boxed{}, else the last one in it.

    Without the commas of thousands, and without a currency's sign. GSM8K's own form is ####.
    """
    marked = _MARKED.findall(text)
    if marked:
        return marked[-1].replace(",", "")
    inside = boxed(text)
    found = _ANY.findall(text if inside is None else inside)
    return found[-1].replace(",", "") if found else None


def same_number(one: str, other: str) -> bool:
    """Equal as decimals: 7, 7.0 and 007 are the same."""
    try:
        return Decimal(one) == Decimal(other)
    except InvalidOperation:
        return False


def choice_letter(text: str) -> str | None:
    """The letter that a text settles on: boxed, after "answer", else the last one that stands alone."""
    inside = boxed(text)
    if inside is not None:
        letter = re.fullmatch(r"(?:\\text(?:bf)?\{)?\s*\(?([A-J])\)?[.:]?\s*\}?", inside)
        if letter:
            return letter.group(1)
    named = _CHOICE.findall(text)
    if named:
        return named[-1].upper()
    # "A" opens sentences and "I" is a word, so a lone letter must look like a choice: (C), C. or a line of its own.
    alone = re.findall(r"\(([A-J])\)|^\s*([A-J])(?:[.):]|\s*$)", text, re.MULTILINE)
    return next((letter for pair in reversed(alone) for letter in pair if letter), None)


def code_block(text: str) -> str:
    """The last fenced block of Python (or of no language), else the whole text, which a base model writes."""
    blocks = [match for match in _FENCE.finditer(text) if match["language"].lower() in ("", "python", "python3", "py")]
    return blocks[-1]["code"] if blocks else text
