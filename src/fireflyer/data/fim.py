"""Fill in the middle: some documents are shown with their middle moved to the end (DeepSeek-V3 report, section 4.1).

Prefix-suffix-middle at character level, before packing: fim_begin prefix fim_hole suffix fim_end middle. Whether and
where a document is cut follows from (seed, source, epoch, document), so that a resumed run cuts it the same.
"""

from fireflyer.data.draws import fraction, words


def split_middle(text: str, rate: float, *key: int | str) -> tuple[str, str, str] | None:
    """(prefix, middle, suffix) of a document chosen for fill in the middle, or None: the share `rate` is chosen.

    Joined they are the text. Both cuts are uniform over all places between characters, so any part may be empty.
    """
    chosen, one, other = words("fim", *key)[:3]
    if fraction(chosen) >= rate:
        return None
    first, second = sorted(int(fraction(word) * (len(text) + 1)) for word in (one, other))
    return text[:first], text[first:second], text[second:]
