"""Preferences: the loss by hand, log-probabilities by a loop, whole runs stopped and gone on."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from chat_runs import base_model, post_training, write_lines
from tiny_run import checkpoint_bytes

from fireflyer.checkpoint.hf import load_model, load_tokenizer
from fireflyer.checkpoint.run import newest_good_checkpoint
from fireflyer.cli.main import main
from fireflyer.data.preferences import pair_rows, read_pairs
from fireflyer.errors import Stopped, UserError
from fireflyer.train.dpo import open_preferences
from fireflyer.train.loop import train
from fireflyer.train.preference_loss import answer_logprobs, preference_terms

PAIRS = [
    {"prompt": [{"role": "user", "content": "q" * (i % 3 + 1)}], "chosen": "alpha beta" * (i % 2 + 1), "rejected": "12"}
    for i in range(10)
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return base_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lines(tmp_path_factory.mktemp("data") / "pairs.jsonl", PAIRS)


def dpo(run_dir: Path, base: Path, data: Path, stop: int | None = None, **settings) -> list[dict]:
    asked = 0

    def should_stop() -> bool:
        nonlocal asked
        asked += 1
        return asked == stop

    train(post_training("dpo", base, data, **settings), run_dir, opener=open_preferences, should_stop=should_stop)
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_the_loss_and_its_gradient_by_hand() -> None:
    """One pair: log-probabilities -3 and -5, reference -4 and -4; β = 0.5, so h = 2 and the margin is 1."""
    logp = torch.tensor([[-3.0, -5.0]], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([[-4.0, -4.0]], dtype=torch.float64)
    terms = preference_terms(logp, reference, 0.5, 0.0)
    assert float(terms.loss.detach()) == pytest.approx(math.log(1 + math.exp(-1)), rel=1e-12)
    assert [float(x) for x in (terms.margin, terms.correct, terms.chosen_reward, terms.rejected_reward)] == [
        1.0, 1.0, 0.5, -0.5,
    ]  # fmt: skip
    terms.loss.backward()
    assert logp.grad is not None
    weight = 0.5 / (1 + math.exp(1))  # β σ(-β h)
    assert logp.grad.flatten().tolist() == pytest.approx([-weight, weight], rel=1e-12)
    smoothed = preference_terms(logp.detach(), reference, 0.5, 0.1)
    by_hand = 0.9 * math.log(1 + math.exp(-1)) + 0.1 * math.log(1 + math.exp(1))
    assert float(smoothed.loss) == pytest.approx(by_hand, rel=1e-12)
    assert float(preference_terms(reference, reference, 0.5, 0.3).loss) == pytest.approx(math.log(2), rel=1e-12)


@pytest.mark.parametrize("normalize", [False, True])
def test_answers_log_probabilities_are_those_of_each_alone(base: Path, data: Path, normalize: bool) -> None:
    model, tokenizer = load_model(base), load_tokenizer(base)
    assert tokenizer is not None
    pairs, _ = read_pairs([str(data)], tokenizer, 64)
    rows = pair_rows(pairs, [1, 2], 64, pad_id=2).rows
    with torch.no_grad():
        out = model.trunk(rows.input_ids_BT, positions=rows.positions_BT, document_ids=rows.document_ids_BT)
        found = answer_logprobs(model, out, rows, normalize)
        for row, pair in zip(found, (pairs[1], pairs[2]), strict=True):
            for value, taught in zip(row, (pair.chosen, pair.rejected), strict=True):
                log_p = model(torch.tensor([taught.token_ids])).logits[0].log_softmax(-1)
                each = [
                    float(log_p[i - 1, taught.token_ids[i]]) for i in range(len(taught.trained)) if taught.trained[i]
                ]
                assert float(value) == pytest.approx(sum(each) / (len(each) if normalize else 1), rel=1e-5)


def test_it_begins_at_the_reference_and_learns_to_prefer(base: Path, data: Path, tmp_path: Path) -> None:
    rows = dpo(tmp_path / "run", base, data, steps=12, schedule__lr=1e-3, eval_every=4, data__held_out=0.2)
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert rows[0]["reward_margin"] == pytest.approx(0, abs=1e-5)
    assert rows[-1]["loss"] < 0.6
    assert rows[-1]["accuracy"] == 1
    assert rows[-1]["eval_accuracy"] == 1
    assert rows[-1]["reward_margin"] == pytest.approx(rows[-1]["chosen_reward"] - rows[-1]["rejected_reward"], abs=1e-6)


def test_the_split_of_a_batch_changes_nothing(base: Path, data: Path, tmp_path: Path) -> None:
    whole = dpo(tmp_path / "a", base, data, steps=3, schedule__lr=1e-3, schedule__warmup_steps=0)
    parts = dpo(
        tmp_path / "b", base, data, steps=3, schedule__lr=1e-3, schedule__warmup_steps=0, parallel__micro_batch_size=1
    )
    assert [row["loss"] for row in whole] == pytest.approx([row["loss"] for row in parts], rel=1e-4)


def test_stopped_anywhere_it_ends_in_the_same_bits(base: Path, data: Path, tmp_path: Path) -> None:
    settings = {"eval_every": 2, "data__held_out": 0.2, "schedule__lr": 1e-3}
    dpo(tmp_path / "whole", base, data, **settings)
    whole = newest_good_checkpoint(tmp_path / "whole")
    assert whole is not None
    for k in (1, 4):
        with pytest.raises(Stopped):
            dpo(tmp_path / f"{k}", base, data, stop=k, **settings)
        dpo(tmp_path / f"{k}", base, data, **settings)
        found = newest_good_checkpoint(tmp_path / f"{k}")
        assert found is not None
        assert checkpoint_bytes(found) == checkpoint_bytes(whole)
        reference = (tmp_path / f"{k}" / "reference.json").read_bytes()
        assert reference == (tmp_path / "whole" / "reference.json").read_bytes()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({**PAIRS[0], "rejected": PAIRS[0]["chosen"]}, "line 2: chosen and rejected are the same"),
        ({**PAIRS[0], "chosne": 1}, "line 2: unknown key 'chosne'"),
        ({**PAIRS[0], "chosen": "b" * 99}, r"line 2: both answers with their prompt come to 1\d\d tokens"),
        ({"prompt": "a", "chosen": "b"}, "line 2: rejected must be"),
        ({"prompt": [], "chosen": "b", "rejected": "c"}, "line 2: chosen: message 0 is by 'assistant'"),
    ],
)
def test_a_bad_pair_is_named_before_the_run(line: dict, words: str, base: Path, tmp_path: Path) -> None:
    data = write_lines(tmp_path / "bad.jsonl", [PAIRS[0], line])
    with pytest.raises(UserError, match=words):
        dpo(tmp_path / "run", base, data)
    assert not (tmp_path / "run").exists()


def test_the_command_runs_and_tables_are_where_they_belong(base: Path, data: Path, tmp_path: Path, capsys) -> None:
    command = ["--from", str(base), "--data", str(data), "--set", "steps=1", "--set", "seq_len=48"]
    assert main(["dpo", *command, "--run", str(tmp_path / "run"), "--set", "batch_size=2"]) == 0
    assert main(["sft", *command, "--run", str(tmp_path / "no"), "--set", "dpo.beta=0.2"]) == 2
    assert main(["pretrain", *command, "--run", str(tmp_path / "no"), "--set", "dpo.beta=0.2"]) == 2
    assert "[dpo]" in capsys.readouterr().err
