"""How many tokens a mixture holds: to turn epochs into steps, and to refuse a run that has too few before it begins."""

from collections.abc import Iterator

from fireflyer.data.encoding import Encoder, RawPart, encode_all
from fireflyer.data.mixture import Mixture
from fireflyer.errors import UserError
from fireflyer.text.tokenizer import Tokenizer


def count_tokens(mixture: Mixture, tokenizer: Tokenizer) -> int:
    """Tokens of all training documents once, begin and end tokens included (fill in the middle adds three to some).

    Raises UserError if a source has no end.
    """
    for source in mixture.sources:
        if source.num_documents is None:
            raise UserError(f"{source.name} has no end, so it has no epochs; set steps or tokens instead")
    return sum(map(len, encode_all(Encoder(tokenizer), _training_parts(mixture))))


def check_enough_data(mixture: Mixture, tokenizer: Tokenizer, *, batch_size: int, seq_len: int) -> None:
    """Raises UserError if an epoch has too few tokens for one batch."""
    if mixture.endless:
        return
    need = batch_size * seq_len + 1
    found = 0
    for stream in encode_all(Encoder(tokenizer), _training_parts(mixture)):
        found += len(stream)
        if found >= need:
            return
    raise UserError(
        f"{', '.join(mixture.names)}: {found} tokens to train on are too little data for one batch of {batch_size} x "
        f"{seq_len} + 1 = {need} tokens; add text or lower batch_size or seq_len"
    )


def _training_parts(mixture: Mixture) -> Iterator[RawPart]:
    for number, source in enumerate(mixture.sources):
        for document in mixture.order(number, 0, 0):
            last = source.num_parts(int(document)) - 1
            for part in range(last + 1):
                yield RawPart(source.read(int(document), part), begins=part == 0, ends=part == last)
