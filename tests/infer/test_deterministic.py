"""`deterministic=True`: the same tokens and log-probabilities, to the last bit, whatever else the engine is doing."""

from functools import cache

import pytest
import torch

from fireflyer import LLM, SamplingParams
from fireflyer.infer import engine as engine_module
from fireflyer.infer.options import EngineOptions
from fireflyer.infer.paged_cache import slot_bytes
from fireflyer.model.row_tiles import RowTiles

VOCAB_SIZE = 300


@pytest.fixture(autouse=True)
def tiles(monkeypatch):
    """Short tiles, so that these short texts fill several; what is known of the shapes is kept between engines."""
    monkeypatch.setattr(engine_module, "RowTiles", short_tiles)


@cache
def short_tiles():
    return RowTiles(kv_tile=16)


@pytest.fixture(scope="module")
def mtp_model(make_model):
    return make_model("V3", num_nextn_predict_layers=2)


def workload():
    """Prompts of many lengths, some with a common beginning; greedy, drawn, filtered, penalised, and all scored."""
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(2, VOCAB_SIZE, (n,), generator=generator).tolist() for n in (1, 40, 7, 25, 90)]
    prompts += [[*prompts[1][:33], 5, 6, 7], prompts[1], prompts[3][:24]]
    kinds = [
        {"temperature": 0},
        {"temperature": 1.0, "seed": 1},
        {"temperature": 0.9, "top_p": 0.9, "top_k": 40, "seed": 2, "n": 2},
        {"temperature": 0, "repetition_penalty": 1.2, "frequency_penalty": 0.5, "prompt_logprobs": 2},
    ]
    shared = {"max_tokens": 12, "ignore_eos": True, "logprobs": 3}
    return prompts, [SamplingParams(**shared, **kinds[i % len(kinds)]) for i in range(len(prompts))]


def make_llm(model, deterministic=True, slots=None, **options):
    if slots is not None:
        layers = model.config.num_layers_with_mtp
        options["cache_gib"] = slot_bytes(layers, model.config.latent_dim, torch.float32) * slots / 2**30
    llm = LLM.from_model(model, options=EngineOptions(deterministic=deterministic, **options))
    llm._weights_may_change = False
    return llm


def answers(llm, prompts, params):
    """Everything an answer consists of; floats compare by their bits."""
    return [
        (output.prompt_logprobs, [(one.token_ids, one.logprobs) for one in output.outputs])
        for output in llm.generate(prompts, params)
    ]


@pytest.fixture(scope="module")
def alone(mtp_model):
    """answers of one request at a time, with a cache of its own and without drafts, by the cache's dtype."""

    @cache
    def make(cache_dtype, deterministic=True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine_module, "RowTiles", short_tiles)
            result = []
            for prompt, params in zip(*workload(), strict=True):
                options = {"cache_dtype": cache_dtype, "prefix_cache": False, "num_speculative_tokens": 0}
                result += answers(make_llm(mtp_model, deterministic, **options), [prompt], [params])
            return result

    return make


SETTINGS = {
    "batch": {"num_speculative_tokens": 0, "prefix_cache": False},
    "drafts": {"num_speculative_tokens": 2, "prefix_cache": False},
    "chained drafts": {"num_speculative_tokens": 4},
    "small chunks": {"num_speculative_tokens": 0, "max_step_tokens": 5},
    "small batch, chunks and drafts": {"max_num_seqs": 3, "max_step_tokens": 17},
    "small blocks, preemption": {"block_size": 4, "max_step_tokens": 30, "slots": 140},
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("cache_dtype", ["fp32", "bf16", "int8"])
def test_answers_are_those_of_the_request_alone(setting, cache_dtype, mtp_model, alone):
    """Twice: the second time the prefix cache knows every prompt."""
    prompts, params = workload()
    llm = make_llm(mtp_model, cache_dtype=cache_dtype, **SETTINGS[setting])
    for _ in range(2):
        assert answers(llm, prompts, params) == alone(cache_dtype)
    stats = llm.engine.stats
    if "preemption" in setting and cache_dtype == "fp32":  # smaller numbers leave room for all
        assert stats.preemptions > 0
    assert (stats.prefix_hit_tokens > 0) == SETTINGS[setting].get("prefix_cache", True)


def test_drafts_that_are_accepted_leave_the_bits(trained):
    """With a model whose MTP layers guess right, so that a step accepts several rows."""
    prompts = [[10 + n, 20 + n, 30 + n] for n in range(4)]
    params = [SamplingParams(temperature=n % 2, seed=n, max_tokens=24, ignore_eos=True, logprobs=2) for n in range(4)]
    expected = []
    for prompt, own in zip(prompts, params, strict=True):
        expected += answers(make_llm(trained, num_speculative_tokens=0, prefix_cache=False), [prompt], [own])
    for num_drafts in (1, 2, 4):
        llm = make_llm(trained, num_speculative_tokens=num_drafts)
        assert answers(llm, prompts, params) == expected
        assert llm.engine.stats.accepted_tokens > 20


def test_without_it_the_same_settings_differ(mtp_model, alone):
    """The control: these texts do show rounding."""
    prompts, params = workload()
    found = answers(make_llm(mtp_model, deterministic=False, **SETTINGS["batch"]), prompts, params)
    expected = alone("auto", deterministic=False)
    assert found != expected
    assert [out[1][0][0] for out in found] == [out[1][0][0] for out in expected]  # but only in the last bits


def test_it_is_the_plain_arithmetic_up_to_rounding(alone):
    for exact, plain in zip(alone("fp32"), alone("auto", deterministic=False), strict=True):
        for (tokens, logprobs), (plain_tokens, plain_logprobs) in zip(exact[1], plain[1], strict=True):
            assert tokens == plain_tokens
            for row, plain_row in zip(logprobs, plain_logprobs, strict=True):
                for token, entry in row.items():
                    assert entry.logprob == pytest.approx(plain_row[token].logprob, abs=1e-4)


def test_bf16_weights(mtp_model):
    model = type(mtp_model)(mtp_model.config)
    model.load_state_dict(mtp_model.state_dict())
    model.to(torch.bfloat16)
    prompts, params = workload()
    options = {"prefix_cache": False, "num_speculative_tokens": 0}
    expected = [answers(make_llm(model, **options), [p], [q])[0] for p, q in zip(prompts, params, strict=True)]
    assert answers(make_llm(model, max_step_tokens=40), prompts, params) == expected
