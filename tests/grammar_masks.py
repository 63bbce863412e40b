"""Helpers of the tests of structured output: grammars asked token by token."""

import numpy as np

PLAIN = [0]
"""A prompt whose answer does not think: the begin token alone."""


def schema_format(schema):
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}


def accepts(compiler, response_format, text):
    """Whether the whole text, and then the end, is allowed token by token."""
    tokenizer = compiler.tokenizer
    state = compiler.start(response_format, PLAIN)
    for token in [*tokenizer.encode(text), tokenizer.eos_id]:
        if not allowed_after(state)[token]:
            return False
        state.commit(token)
    return True


def allowed_after(state, *drafts):
    """Booleans by token id."""
    size = state._compiler.tokenizer.vocab_size
    words = np.zeros((1, (size + 31) // 32), dtype=np.uint32)
    (error,) = state.fill(words, [drafts])
    assert error is None
    return np.unpackbits(words.view(np.uint8), count=size, bitorder="little").astype(bool)


def allowed_tokens(state, *drafts):
    return np.flatnonzero(allowed_after(state, *drafts)).tolist()
