"""The problems: right, unique where held out, and then never seen in training."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fireflyer.data.arithmetic import (
    ArithmeticSource,
    format_problem,
    held_out_problems,
    read_answer,
    worked_answer,
)
from fireflyer.data.loader import Loader
from fireflyer.data.mixture import open_sources
from fireflyer.text.tokenizer import Tokenizer


def test_two_problems_by_hand() -> None:
    assert format_problem(12345678, "+", 42) == "12345678+00000042="
    assert worked_answer(12345678, "+", 42) == "a8210b7412c6007d5005e4004f3003g2002h1001=012345720"
    assert format_problem(10000000, "-", 1) == "10000000-00000001="
    assert worked_answer(10000000, "-", 1) == "a0119b0019c0019d0019e0019f0019g0019h1000=009999999"


@given(a=st.integers(0, 10**8 - 1), b=st.integers(0, 10**8 - 1), op=st.sampled_from("+-"))
def test_each_place_is_schoolbook_arithmetic_and_the_result_pythons(a: int, b: int, op: str) -> None:
    if op == "-":
        a, b = max(a, b), min(a, b)
    text = worked_answer(a, op, b)
    working, result = text.split("=")
    places = re.findall("[a-h][0-9]{4}", working)
    carry = 0
    assert "".join(place[0] for place in places) == "abcdefgh"
    for place, digit_a, digit_b in zip(places, f"{a:08d}"[::-1], f"{b:08d}"[::-1], strict=True):
        assert place[1:3] == digit_a + digit_b
        out, digit = int(place[3]), int(place[4])
        if op == "+":
            assert int(digit_a) + int(digit_b) + carry == 10 * out + digit
        else:
            assert int(digit_a) - int(digit_b) - carry == digit - 10 * out
        carry = out
    assert int(result) == (a + b if op == "+" else a - b)
    assert read_answer(text) == read_answer(format_problem(a, op, b) + text) == int(result)


@pytest.mark.parametrize("text", ["", "12345678+00000042=", "a8210b7412", "a8210=12", "a8210=0123457200", "=12345678x"])
def test_what_is_no_answer_reads_as_none(text: str) -> None:
    assert read_answer(text) is None


def problem_of(text: str) -> tuple[int, str, int]:
    match = re.match(r"(\d{8})([+-])(\d{8})=", text)
    assert match
    return int(match[1]), match[2], int(match[3])


def test_held_out_problems_are_unique_and_many_have_eight_digits() -> None:
    for seed in (0, 1):
        problems = held_out_problems(seed)
        assert [problem.op for problem in problems] == ["+"] * 500 + ["-"] * 500
        assert len({(op, frozenset((a, b))) for a, op, b in problems}) == 1000
        assert sum(min(a, b) >= 10**7 for a, _, b in problems) >= 300
        assert sum(max(a, b) < 10**6 for a, _, b in problems) > 50
        assert all(a > b for a, op, b in problems if op == "-")
        assert all(0 <= a < 10**8 and 0 <= b < 10**8 for a, _, b in problems)
    assert held_out_problems(0) == held_out_problems(0) != held_out_problems(1)


def test_training_never_shows_a_held_out_problem_or_its_twin() -> None:
    held_out = {(op, frozenset((a, b))) for a, op, b in held_out_problems(3)}
    source = ArithmeticSource(3)
    shown = [problem_of(source.read(i).text) for i in range(30_000)]
    assert not {(op, frozenset((a, b))) for a, op, b in shown} & held_out
    short_held_out = {key for key in held_out if max(key[1]) < 100}
    short_shown = {(op, frozenset((a, b))) for a, op, b in shown if max(a, b) < 100}
    assert len(short_held_out) > 5
    assert len(short_shown) > 300, "the same small numbers do appear in other problems"


def test_documents_follow_from_seed_and_number() -> None:
    source, again, other = ArithmeticSource(5), ArithmeticSource(5), ArithmeticSource(6)
    texts = [source.read(i).text for i in range(50)]
    assert [again.read(i).text for i in reversed(range(50))] == texts[::-1]
    assert [other.read(i).text for i in range(50)] != texts
    for i, text in enumerate(texts):
        a, op, b = problem_of(text)
        assert text == format_problem(a, op, b) + worked_answer(a, op, b)
        assert source.read(i).loss_from == len(format_problem(a, op, b))


def test_digit_counts_and_operators_are_spread() -> None:
    source = ArithmeticSource(0)
    shown = [problem_of(source.read(i).text) for i in range(4000)]
    digits = [len(str(number)) for a, _, b in shown for number in (a, b)]
    shares = [digits.count(count) / len(digits) for count in range(1, 9)]
    assert all(abs(share - 1 / 12) < 0.02 for share in shares[:7])
    assert abs(shares[7] - 5 / 12) < 0.03
    assert abs(sum(op == "+" for _, op, _ in shown) / len(shown) - 0.5) < 0.03


def test_every_row_of_the_loader_holds_one_problem() -> None:
    tokenizer = Tokenizer.train([], 275)
    mixture = open_sources(["builtin:arithmetic"], seed=2)
    documents = [mixture.sources[0].read(i) for i in range(40)]
    length = {len(tokenizer.encode(document.text, bos=True, eos=True)) for document in documents}
    assert len(length) == 1
    loader = Loader(mixture, tokenizer, seq_len=length.pop(), seed=9)
    batch = loader.next_batch(40)
    for row, labels, document in zip(batch.input_ids_BT.tolist(), batch.labels_BT.tolist(), documents, strict=True):
        assert tokenizer.decode(row) == document.text
        answer = document.text[document.loss_from :]
        # Loss on the working, the result and the end, on nothing of the prompt and not on the next problem's begin.
        assert labels[: document.loss_from] == [-100] * document.loss_from
        assert labels[-1] == -100
        assert labels[document.loss_from : -1] == tokenizer.encode(answer, eos=True)
    assert loader.epoch == 0


def test_held_out_problems_are_what_evaluation_reads() -> None:
    source = ArithmeticSource(4)
    texts = [part.text for parts in source.held_out_documents() for part in parts]
    assert sorted(problem_of(text) for text in texts) == sorted(map(tuple, held_out_problems(4)))
    assert {problem_of(text)[1] for text in texts[:20]} == {"+", "-"}
