"""Token ids in, one at a time; text out in whole characters.

A character of several bytes may be spread over several tokens. Text that is shown while it is generated must wait for
the last of them, or an emoji arrives as three question marks.
"""

import codecs

from fireflyer.text.tokenizer import Tokenizer


class StreamDecoder:
    """Decodes one stream of ids. All that push() and the final flush() return, joined, equals Tokenizer.decode."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """The characters that this token completes: none, one or several. Bytes that can't become one are U+FFFD."""
        return self._decoder.decode(self._tokenizer.token_bytes(token_id, self._skip_special))

    def flush(self) -> str:
        """U+FFFD if the stream ended inside a character, else nothing. The decoder is then ready for another stream."""
        return self._decoder.decode(b"", final=True)
