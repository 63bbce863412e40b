"""`fireflyer bench`: the figures fit each other, the model's own routing, and the machine; refusals."""

import json

import pytest
import torch

from fireflyer import LLM, SamplingParams
from fireflyer.cli.main import main
from fireflyer.cost.memory import decode_step_bytes
from fireflyer.evaluate.speed import measure_speed, sample_prompts
from fireflyer.infer.options import EngineOptions
from fireflyer.model.decoder import Decoder


def bench(capsys, checkpoint, *options: str) -> dict:
    assert main(["bench", str(checkpoint), "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)


def test_one_sequence_reads_its_active_weights_for_every_token(tiny_checkpoint, capsys):
    facts = bench(capsys, tiny_checkpoint, "--prompt-tokens", "40", "--new-tokens", "12")
    config = LLM(tiny_checkpoint).config
    step_bytes = decode_step_bytes(config, [40 + 6], bytes_per_weight=4, bytes_per_cached=4)
    assert facts["experts_per_layer"] == config.num_experts_per_tok
    assert facts["gb_per_s"] * 1e9 == pytest.approx(facts["decode_tokens_per_s"] * step_bytes, rel=1e-6)
    assert 0 < facts["bandwidth_share"] < 1
    assert facts["bandwidth_share"] == pytest.approx(facts["gb_per_s"] / facts["bandwidth_gb_per_s"])
    assert facts["mtp_acceptance"] is None


def test_a_batch_reads_the_experts_that_any_of_its_tokens_chose(tiny_checkpoint):
    """Oracle: the decoder itself, run over each whole sequence."""
    llm = LLM(tiny_checkpoint)
    prompts = sample_prompts(range(3, 250), 3, 20)
    speed = measure_speed(llm, prompts, 6)
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    answers = [output.outputs[0].token_ids for output in llm.generate(prompts, params)]
    with torch.no_grad():
        routed = [
            [layer.indices_NK for layer in llm.model.trunk(torch.tensor([prompt + answer]), num_mtp=0).routing]
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
    counts = [
        len({expert for sequence in routed for expert in sequence[layer][20 + i - 1].tolist()})
        for layer in range(len(routed[0]))
        for i in range(1, 6)
    ]
    assert speed.experts_per_layer == pytest.approx(sum(counts) / len(counts))


def test_drafts_are_measured_apart(tiny_checkpoint):
    """A model whose weights are all alike says one token for ever, which its MTP layer drafts every time."""
    model = Decoder(LLM(tiny_checkpoint).config.replace(num_nextn_predict_layers=1))
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, 0.01)
    speed = measure_speed(LLM.from_model(model), [[5, 6, 7]], 20)
    assert speed.mtp_acceptance == 1.0
    assert speed.mtp_decode_tokens_per_s is not None
    plain = measure_speed(LLM.from_model(model, options=EngineOptions(num_speculative_tokens=0)), [[5, 6, 7]], 20)
    assert plain.mtp_acceptance is None


def test_prompts_are_pieces_of_the_text_from_different_places():
    text = list(range(100))
    prompts = sample_prompts(text, 8, 30)
    assert all(prompt == list(range(prompt[0], prompt[0] + 30)) for prompt in prompts)
    assert len({prompt[0] for prompt in prompts}) == 8
    assert [len(prompt) for prompt in sample_prompts([1, 2], 4, 9)] == [9] * 4


def test_the_table_and_a_text_of_ones_own(tiny_checkpoint, capsys, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the fox and the dog and the fox\n" * 20)
    options = ["--text", str(text), "--prompt-tokens", "20", "--new-tokens", "4", "--batch", "2"]
    assert main(["bench", str(tiny_checkpoint), *options]) == 0
    out = capsys.readouterr().out
    assert out.startswith("2 x 20 tokens of prompt, 4 of answer; float32")
    assert "GB/s" in out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--batch", "0"], "--batch is 0; it must be at least 1"),
        (["--new-tokens", "1"], "--new-tokens is 1; it must be at least 2"),
        (["--prompt-tokens", "60000"], "don't fit into the model's context of 50000"),
        (["--text", "absent.txt"], "--text absent.txt: "),
    ],
)
def test_refusals(tiny_checkpoint, capsys, options, words):
    assert main(["bench", str(tiny_checkpoint), *options]) == 2
    err = capsys.readouterr().err
    assert words in err
    assert len(err.splitlines()) == 1
