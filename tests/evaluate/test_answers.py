"""What a text settles on, case by case."""

from __future__ import annotations

import pytest

from fireflyer.evaluate.answers import boxed, choice_letter, code_block, last_number, same_number, without_thinking


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She sold 48/2 = <<48/2=24>>24 clips.\n#### 72", "72"),
        ("so 12 apples.\n#### -1,234.50", "-1234.50"),
        ("#### $5\nQuestion: 9", "5"),
        ("The answer is 1,000.", "1000"),
        ("The answer is $18.50.", "18.50"),
        ("It costs 3 dollars, then 4.", "4"),
        (r"We get \boxed{42}, after 7 steps", "42"),
        (r"\boxed{\frac{x}{2}} no, \boxed{ 17 }", "17"),
        ("5 - 8 = -3", "-3"),
        ("between 2010-2012", "2012"),
        ("no digits at all", None),
        ("x2", None),
    ],
)
def test_numbers(text, number):
    found = last_number(text)
    assert found == number or (found is not None and number is not None and same_number(found, number))


def test_equal_numbers():
    assert same_number("7", "007.0")
    assert not same_number("7", "7.01")
    assert not same_number("seven", "7")


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"first \boxed{1}, then \boxed{2}", "2"),
        (r"\fbox{x}", "x"),
        (r"\boxed{never closed", None),
        ("none", None),
    ],
)
def test_boxed(text, inside):
    assert boxed(text) == inside


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("Answer: B", "B"),
        ("**Answer: C**", "C"),
        ("The correct answer is (D).", "D"),
        ("A first look says A. But the answer is C", "C"),
        (r"\boxed{\text{B}}", "B"),
        (r"$\boxed{(A)}$", "A"),
        ("B", "B"),
        ("C. because it rains", "C"),
        ("I think it rains. A cloud came.", None),
        ("answer: $C$", "C"),
    ],
)
def test_choices(text, letter):
    assert choice_letter(text) == letter


def test_code():
    assert code_block("Sure:\n```python\nx = 1\n```\nand\n```\ny = 2\n```\n```bash\nls\n```") == "y = 2"
    assert code_block("    return x") == "    return x"
    assert code_block("```python\nx = 1\ncut off") == "x = 1\ncut off"


def test_thinking():
    assert without_thinking("<think>3?</think>4") == "4"
    assert without_thinking("3?</think>4") == "4"
    assert without_thinking("<think>3? no") is None
    assert without_thinking("4") == "4"
