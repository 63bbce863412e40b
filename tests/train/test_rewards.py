"""The form of an answer, and what of it is graded."""

from __future__ import annotations

import pytest

from fireflyer.train.rewards import final_answer, well_formed

OPEN = "question <think>\n"


@pytest.mark.parametrize(
    ("prompt", "reply", "formed", "answer"),
    [
        ("q", "<think>so</think>42", True, "42"),
        ("q", "<think></think> 42\n", True, "42"),
        ("q", "\n<think>so</think>\n\n42", True, "42"),
        (OPEN, "so</think>42", True, "42"),
        (OPEN, "<think>so</think>42", False, "42"),
        (OPEN, "so 42", False, ""),
        ("q", "42", False, "42"),
        ("q", "<think>so 42", False, ""),
        ("q", "<think>so</think>", False, ""),
        ("q", "<think>so</think>  ", False, ""),
        ("q", "well <think>so</think>42", False, "42"),
        ("q", "<think>so</think>41</think>42", False, "42"),
        ("q", "<think>so<think></think>42", False, "42"),
        ("q", "so</think>42", False, "42"),
    ],
)
def test_form_and_answer(prompt: str, reply: str, formed: bool, answer: str):
    assert well_formed(prompt, reply, ended=True) == formed
    assert not well_formed(prompt, reply, ended=False)
    assert final_answer(prompt, reply) == answer
