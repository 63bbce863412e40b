"""Where a form begins: after the thinking, whoever opened it and however its end is spelled."""

import pytest
import torch
from grammar_masks import allowed_after, allowed_tokens

from fireflyer.infer.sampler import Sampler
from fireflyer.infer.sampling_params import SamplingParams
from fireflyer.infer.sampling_state import SampleRow, SamplingState
from fireflyer.infer.structured_output import GrammarCompiler
from fireflyer.text.special_tokens import ASSISTANT, BEGIN, THINK_BEGIN, THINK_END, USER
from fireflyer.text.tokenizer import Tokenizer

pytest.importorskip("llguidance")


@pytest.fixture(scope="module")
def compiler(tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer, [tokenizer.eos_id])


FORM = {"type": "regex", "pattern": "yes|no"}


def first_letters(tokenizer, token_ids):
    return {tokenizer.token_text(token)[0] for token in token_ids}


def test_the_form_begins_after_thinking_that_the_prompt_opened(compiler, tokenizer):
    prompt = [tokenizer.special_id(BEGIN), tokenizer.special_id(ASSISTANT), tokenizer.special_id(THINK_BEGIN)]
    state = compiler.start(FORM, [*prompt, *tokenizer.encode("\n")])
    end = tokenizer.special_id(THINK_END)
    for drafts in ([], tokenizer.encode("hm, </thin"), tokenizer.encode("yes")):
        allowed = allowed_after(state, *drafts)
        assert not allowed[tokenizer.eos_id]
        assert allowed.sum() == tokenizer.vocab_size - 1
    assert first_letters(tokenizer, allowed_tokens(state, *tokenizer.encode("hm"), end)) == {"y", "n"}
    # Drafts move nothing; the same tokens committed do.
    assert allowed_after(state).sum() == tokenizer.vocab_size - 1
    for token in [*tokenizer.encode("hm"), end, *tokenizer.encode("no")]:
        state.commit(token)
    assert allowed_tokens(state) == [tokenizer.eos_id]


def test_thinking_spelled_out_ends_too(compiler, tokenizer):
    """Where </think> comes letter by letter, as from a tokenizer that has no such token."""
    state = compiler.start(FORM, [tokenizer.special_id(ASSISTANT), tokenizer.special_id(THINK_BEGIN)])
    spelled = tokenizer.encode("well </think>")
    assert tokenizer.special_id(THINK_END) not in spelled
    for token in spelled[:-1]:
        state.commit(token)
    assert allowed_after(state).sum() == tokenizer.vocab_size - 1
    state.commit(spelled[-1])
    assert first_letters(tokenizer, allowed_tokens(state)) == {"y", "n"}


@pytest.mark.parametrize(
    ("text", "follows", "error"),
    [(">", "yn", None), (">\n\n", "yn", None), (">no", "<", None), (">x", "", "does not go on")],
)
def test_one_token_may_hold_the_end_of_thinking_and_the_start_of_the_form(text, follows, error):
    tokenizer = Tokenizer.train([f"</think{text}"] * 50 + ["yes no"], vocab_size=290)
    long_token = tokenizer.encode(f"</think{text}")
    state = GrammarCompiler(tokenizer, []).start(
        FORM, [tokenizer.special_id(ASSISTANT), tokenizer.special_id(THINK_BEGIN)]
    )
    for token in long_token:
        state.commit(token)
    if error is None:
        assert first_letters(tokenizer, allowed_tokens(state)) == set(follows)
    else:
        (sampled,) = Sampler(tokenizer.vocab_size)(
            [SampleRow(SamplingState(SamplingParams(temperature=0), grammar=state))],
            torch.zeros(1, tokenizer.vocab_size),
        )
        assert error in (sampled.error or "")


def test_a_model_may_open_thinking_with_its_first_token(compiler, tokenizer):
    """In a chat whose prompt left it open; not in a plain text, not after a prompt that closed it, not later."""
    think, end = tokenizer.special_id(THINK_BEGIN), tokenizer.special_id(THINK_END)
    assistant = [tokenizer.special_id(USER), *tokenizer.encode("hi"), tokenizer.special_id(ASSISTANT)]
    state = compiler.start(FORM, assistant)
    assert first_letters(tokenizer, allowed_tokens(state)) == {"y", "n", "<"}
    assert allowed_after(state)[think]
    assert allowed_after(state, think).sum() == tokenizer.vocab_size - 1
    assert not allowed_after(state, think, end)[think]
    (y,) = tokenizer.encode("y")
    assert not allowed_after(state, y)[think]
    for prompt in ([*assistant, end], tokenizer.encode("a plain text"), [*assistant, think, end]):
        assert not allowed_after(compiler.start(FORM, prompt))[think]
