"""The engine against the plain decoder: every setting on and off, prefix hits, preemption, abort, errors, crowds."""

import itertools
import random

import pytest
import torch

from fireflyer import LLM, SamplingParams, UserError
from fireflyer.infer import engine as engine_module
from fireflyer.infer.engine import Engine
from fireflyer.infer.model_runner import ModelRunner, absorbed_up_to
from fireflyer.infer.options import EngineOptions
from fireflyer.infer.paged_cache import slot_bytes
from fireflyer.infer.sampler import SampledToken, Sampler

VOCAB_SIZE = 300
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)


def with_options(model, tokenizer=None, **options):
    """An LLM whose calls may find each other's blocks: the weights stay."""
    llm = LLM.from_model(model, tokenizer, options=EngineOptions(**options))
    llm._weights_may_change = False
    return llm


def gib_for(model, num_slots, num_drafting=0):
    layers = model.config.num_hidden_layers + num_drafting
    return slot_bytes(layers, model.config.latent_dim, torch.float32) * num_slots / 2**30


def token_prompts(lengths, seed=7):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def without_cache(model, prompt, num_tokens):
    sequence = list(prompt)
    for _ in range(num_tokens):
        sequence.append(int(model(torch.tensor([sequence]), num_mtp=0).logits[0, -1].argmax()))
    return sequence[len(prompt) :]


def run(engine):
    while engine.unfinished:
        engine.step()


@pytest.fixture(scope="module")
def mtp_model(make_model):
    return make_model("V3", num_nextn_predict_layers=1)


@pytest.fixture(scope="module")
def workload(mtp_model):
    """Prompts of one token to beyond the original rope, some with a common beginning, and the plain model's answers."""
    prompts = token_prompts((1, 40, 7, 25, 12))
    prompts += [[*prompts[1][:33], 5, 6, 7], prompts[1], prompts[3][:24]]
    return prompts, [without_cache(mtp_model, prompt, 12) for prompt in prompts]


@pytest.mark.parametrize("num_drafts", [0, 1, 3])
@pytest.mark.parametrize("prefix_cache", [True, False])
@pytest.mark.parametrize(("max_num_seqs", "max_step_tokens"), [(64, 2048), (3, 9), (64, 17)])
def test_every_setting_gives_the_plain_models_tokens(
    num_drafts, prefix_cache, max_num_seqs, max_step_tokens, mtp_model, workload
):
    """Twice over the same engine: the second time everything is there already."""
    prompts, expected = workload
    for block_size, slots in ((16, None), (4, 60)):
        llm = with_options(
            mtp_model,
            num_speculative_tokens=num_drafts,
            prefix_cache=prefix_cache,
            max_num_seqs=max_num_seqs,
            max_step_tokens=max_step_tokens,
            block_size=block_size,
            cache_gib=None if slots is None else gib_for(mtp_model, slots, min(num_drafts, 1)),
        )
        for repeat, _ in enumerate(range(2)):
            outputs = llm.generate(prompts, GREEDY)
            assert [output.outputs[0].token_ids for output in outputs] == expected
            cached = [output.num_cached_tokens for output in outputs]
            if not prefix_cache:
                assert cached == [0] * len(prompts)
            elif repeat and slots is None:
                assert cached[1] == (32 if num_drafts == 0 else 16)
        if slots is not None and max_num_seqs > 3:
            assert llm.engine.stats.preemptions > 0
        llm.engine.check_integrity()
        assert llm.engine.stats.blocks_used == 0


@pytest.mark.parametrize("kind", ["V3", "V2"])
@pytest.mark.parametrize("cache_dtype", ["auto", "fp32", "bf16", "int8"])
def test_prefix_hits_and_pieces_leave_the_logits(kind, cache_dtype, make_model):
    """The distribution after a prompt: cold in one piece, in pieces of every size, and after hits of every length."""
    model = make_model(kind)
    prompt = token_prompts((45,))[0]
    scored = SamplingParams(temperature=0, max_tokens=1, logprobs=-1, ignore_eos=True)

    def logprobs(llm):
        output = llm.generate(prompt, scored)[0]
        (row,) = output.outputs[0].logprobs
        return torch.tensor([row[token].logprob for token in range(VOCAB_SIZE)]), output.num_cached_tokens

    cold, _ = logprobs(with_options(model, cache_dtype=cache_dtype))
    with torch.no_grad():
        plain = model(torch.tensor([prompt])).logits[0, -1].log_softmax(-1)
    exact = cache_dtype in ("auto", "fp32")
    near = 1e-4 if exact else {"bf16": 0.4, "int8": 0.6}[cache_dtype] * float(plain.std())
    torch.testing.assert_close(cold, plain, rtol=0, atol=near)
    for step in (1, 7, 16, 44):
        pieces, _ = logprobs(with_options(model, cache_dtype=cache_dtype, max_step_tokens=step))
        torch.testing.assert_close(pieces, plain, rtol=0, atol=near)
    for shared in (4, 11, 28, 44):
        llm = with_options(model, cache_dtype=cache_dtype, block_size=4)
        llm.generate([*prompt[:shared], 9], scored)
        hit, cached = logprobs(llm)
        assert cached == shared // 4 * 4
        torch.testing.assert_close(hit, plain, rtol=0, atol=near)


def test_absorbed_and_expanded_pieces_agree(model, monkeypatch):
    """Every length of a piece around the switch, against the plain model, with and without something before it."""
    assert absorbed_up_to(model.config) == 16 * 16 // (36 - 20)
    prompt = token_prompts((60,))[0]
    expected = without_cache(model, prompt, 3)
    three = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    for limit in (0, 5, 1000):
        monkeypatch.setattr("fireflyer.infer.model_runner.absorbed_up_to", lambda config, limit=limit: max(limit, 1))
        for step in (1, 2, 5, 6, 23, 60):
            llm = with_options(model, max_step_tokens=step, prefix_cache=False)
            assert llm.generate(prompt, three)[0].outputs[0].token_ids == expected


def test_prompts_are_read_beside_decoding(model):
    """A long prompt comes while another answer is being written: it never has to wait for more than one piece."""
    llm = with_options(model, max_step_tokens=8)
    short, long = (llm.make_request(p, GREEDY) for p in token_prompts((3, 60)))
    llm.engine.add(short)
    llm.engine.step()
    llm.engine.add(long)
    for expected in range(2, 9):
        llm.engine.step()
        assert short.answers[0].num_written == expected
        assert long.answers[0].num_computed == (expected - 1) * 7
    run(llm.engine)
    for request, prompt in zip((short, long), token_prompts((3, 60)), strict=True):
        assert request.answers[0].token_ids == without_cache(model, prompt, 12)


def test_the_latest_comer_gives_way(model):
    """Blocks for two of three: the first two are never interrupted, the third is told apart by its steps."""
    llm = with_options(model, block_size=4, cache_gib=gib_for(model, 60))
    requests = [llm.make_request(p, SamplingParams(temperature=0, max_tokens=18)) for p in token_prompts((10, 10, 6))]
    preempted = []
    real = llm.engine._scheduler.preempt
    llm.engine._scheduler.preempt = lambda answer: preempted.append(answer) or real(answer)
    for request in requests:
        llm.engine.add(request)
    while llm.engine.unfinished:
        llm.engine.step()
        llm.engine.check_integrity()
    assert preempted
    assert {answer.request for answer in preempted} == {requests[2]}
    assert llm.engine.stats.preemptions == len(preempted)


def test_first_come_first_served(model):
    llm = with_options(model, max_num_seqs=2)
    requests = [llm.make_request(p, GREEDY) for p in token_prompts((3, 4, 5, 6, 7))]
    for request in requests:
        llm.engine.add(request)
    ended = []
    while llm.engine.unfinished:
        assert llm.engine.stats.running <= 2
        ended += [request for request in llm.engine.step() if request.finished]
    assert ended == requests


def test_abort_takes_a_request_out_wherever_it_is(model):
    llm = with_options(model, max_num_seqs=2, max_step_tokens=8)
    prompts = token_prompts((5, 40, 6, 7))
    requests = [llm.make_request(p, GREEDY) for p in prompts]
    for request in requests:
        llm.engine.add(request)
    llm.engine.step()
    llm.engine.step()
    assert [r.answers[0].in_prompt for r in requests] == [False, True, True, True]
    for index in (1, 3):  # one in the middle of its prompt, one that waits
        assert llm.engine.abort(requests[index].request_id) is requests[index]
        assert requests[index].output().outputs[0].finish_reason == "abort"
        llm.engine.check_integrity()
    assert llm.engine.abort("nobody") is None
    run(llm.engine)
    assert llm.engine.abort(requests[0].request_id) is None
    for index in (0, 2):
        assert requests[index].answers[0].token_ids == without_cache(model, prompts[index], 12)
    assert llm.engine.stats.blocks_used == 0


def test_a_request_that_can_never_fit_is_refused_at_once(model):
    llm = with_options(model, block_size=4, cache_gib=gib_for(model, 44))
    assert llm.engine.max_tokens == 40
    with pytest.raises(UserError, match=r"40 tokens, which leaves no room .* in the 40 that the cache holds"):
        llm.generate(token_prompts((40,))[0], GREEDY)
    filled = llm.generate(token_prompts((37,))[0], GREEDY)[0].outputs[0]
    assert filled.finish_reason == "length"
    assert filled.token_ids == without_cache(model, token_prompts((37,))[0], 3)
    with pytest.raises(UserError, match="cache_gib"):
        with_options(model, cache_gib=1e-6)


def test_n_answers_share_the_prompt(model, mtp_model):
    """Each has a seeded stream of its own, as when asked for alone; only one of them reads the prompt."""
    prompt = token_prompts((50,))[0]
    params = SamplingParams(n=4, seed=5, max_tokens=9, ignore_eos=True)
    for one in (model, mtp_model):
        for prefix_cache, step in itertools.product((True, False), (2048, 20)):
            llm = with_options(one, prefix_cache=prefix_cache, max_step_tokens=step, block_size=8)
            output = llm.generate(prompt, params)[0]
            assert [answer.index for answer in output.outputs] == [0, 1, 2, 3]
            assert len({tuple(answer.token_ids) for answer in output.outputs}) == 4
            assert output.num_cached_tokens == 0
            alone = with_options(one).generate(prompt, SamplingParams(seed=5, max_tokens=9, ignore_eos=True))[0]
            assert output.outputs[0].token_ids == alone.outputs[0].token_ids
            request = llm.make_request(prompt, params)
            llm.engine.add(request)
            read = 0
            while llm.engine.unfinished:
                llm.engine.step()
                read = max(read, llm.engine.stats.blocks_used)
            # 48 of the 50 tokens are 6 full blocks, of which drafts compute the last one again.
            shared = 6 if one is model else 5
            assert read <= shared + 4 * (-(-58 // 8) - shared) + 4
            assert [a.token_ids for a in request.answers] == [a.token_ids for a in output.outputs]


def test_aborting_n_answers_whose_prompt_is_still_read(model):
    llm = with_options(model, max_step_tokens=10)
    request = llm.make_request(token_prompts((50,))[0], SamplingParams(n=3, max_tokens=5))
    llm.engine.add(request)
    llm.engine.step()
    assert llm.engine.stats.waiting == 2
    llm.engine.abort(request.request_id)
    assert not llm.engine.unfinished
    assert llm.engine.stats.waiting == 0
    llm.engine.check_integrity()


def test_prompt_logprobs_are_the_plain_models(model, monkeypatch):
    """In pieces of the prompt and of the vocabulary's rows, beside others, and not from a prefix hit."""
    prompt = token_prompts((45,))[0]
    with torch.no_grad():
        exact = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
    for rows in (1 << 22, 7 * VOCAB_SIZE):
        monkeypatch.setattr(engine_module, "_LOGIT_ELEMENTS", rows)
        for options in ({}, {"max_step_tokens": 16}):
            llm = with_options(model, **options)
            llm.generate(prompt, GREEDY)
            params = [
                SamplingParams(prompt_logprobs=2, logprobs=0, max_tokens=2, temperature=0, ignore_eos=True),
                GREEDY,
            ]
            output, other = llm.generate([prompt, prompt], params)
            assert output.num_cached_tokens == 0
            assert other.num_cached_tokens == 32
            assert other.prompt_logprobs is None
            assert output.prompt_logprobs[0] is None
            assert len(output.prompt_logprobs) == 45
            for position, entries in enumerate(output.prompt_logprobs[1:], start=1):
                row = exact[position - 1]
                assert set(entries) == {prompt[position], *row.topk(2).indices.tolist()}
                for token, entry in entries.items():
                    assert entry.logprob == pytest.approx(float(row[token]), abs=1e-4)


def test_prompt_logprobs_survive_preemption(model):
    llm = with_options(model, block_size=4, cache_gib=gib_for(model, 64), max_step_tokens=12)
    scored = SamplingParams(prompt_logprobs=0, max_tokens=20, temperature=0, ignore_eos=True)
    outputs = llm.generate(token_prompts((20, 18)), scored)
    assert llm.engine.stats.preemptions > 0
    alone = [with_options(model).generate(prompt, scored)[0] for prompt in token_prompts((20, 18))]
    for mine, theirs in zip(outputs, alone, strict=True):
        assert mine.outputs[0].token_ids == theirs.outputs[0].token_ids
        assert len(mine.prompt_logprobs) == len(theirs.prompt_logprobs)
        for a, b in zip(mine.prompt_logprobs[1:], theirs.prompt_logprobs[1:], strict=True):
            assert {t: entry.logprob for t, entry in a.items()} == pytest.approx(
                {t: entry.logprob for t, entry in b.items()}, abs=1e-4
            )


def test_experts_are_those_of_the_plain_model(mtp_model):
    prompt = token_prompts((9,))[0]
    for num_drafts in (0, 1):
        llm = with_options(mtp_model, num_speculative_tokens=num_drafts)
        request = llm.make_request(prompt, GREEDY, report_experts=True)
        llm.engine.add(request)
        parts = []
        while llm.engine.unfinished:
            llm.engine.step()
            parts += request.take_parts()
        experts = [row for part in parts for row in part.experts]
        sequence = [*prompt, *request.answers[0].token_ids]
        with torch.no_grad():
            routing = mtp_model.trunk(torch.tensor([sequence]), num_mtp=0).routing
        for place, layers in enumerate(experts):
            # A token is answered by the experts of the position before it.
            assert layers == [layer.indices_NK[8 + place].tolist() for layer in routing]


def test_one_failing_request_leaves_the_others(model, monkeypatch):
    """Its own error ends it with what it has; nothing of it is found by who comes later; its blocks are wiped."""
    real = Sampler.__call__

    def failing(self, rows, logits):
        sampled = real(self, rows, logits)
        for index, row in enumerate(rows):
            if row.state is bad.answers[0].sampling and row.position == 3:
                sampled[index] = SampledToken(-1, error="its grammar broke")
        return sampled

    monkeypatch.setattr(Sampler, "__call__", failing)
    llm = with_options(model, block_size=4)
    prompts = token_prompts((9, 12, 10))
    requests = [llm.make_request(prompt, GREEDY) for prompt in prompts]
    bad = requests[1]
    for request in requests:
        llm.engine.add(request)
    while llm.engine.unfinished:
        llm.engine.step()
        llm.engine.check_integrity()
    answer = bad.output().outputs[0]
    assert (answer.finish_reason, answer.error) == ("error", "its grammar broke")
    assert answer.token_ids == without_cache(model, prompts[1], 3)
    for index in (0, 2):
        assert requests[index].answers[0].token_ids == without_cache(model, prompts[index], 12)
    assert llm.generate(prompts[1], GREEDY)[0].num_cached_tokens == 0
    # Two at once: the one that is well is returned, and only where none is left does it raise.
    monkeypatch.setattr(Sampler, "__call__", lambda self, rows, _: [SampledToken(-1, error="all broke")] * len(rows))
    with pytest.raises(UserError, match="all broke"):
        llm.generate(prompts, GREEDY)


def test_numbers_that_are_not_finite_end_their_request_and_spread_to_none(model, make_model):
    """One token's embedding is damaged: whoever has it ends with an error; who gets the blocks later is well."""
    broken = make_model("V3")
    with torch.no_grad():
        broken.model.embed_tokens.weight[77] = torch.nan
    llm = with_options(broken, block_size=4, cache_gib=gib_for(model, 84))
    clean = [p for p in token_prompts((9, 12, 10)) if 77 not in p]
    outputs = llm.generate([clean[0], [5, 77, *[9] * 30]], GREEDY)
    assert outputs[1].outputs[0].finish_reason == "error"
    assert "not finite" in outputs[1].outputs[0].error
    for _ in range(3):
        for prompt, output in zip(clean, llm.generate(clean, GREEDY), strict=True):
            assert output.outputs[0].token_ids == without_cache(model, prompt, 12)
    with pytest.raises(UserError, match="not finite"):
        llm.generate([[77]], GREEDY)


def test_an_exception_ends_the_steps_requests_and_the_engine_goes_on(model, monkeypatch):
    llm = with_options(model, max_num_seqs=2)
    prompts = token_prompts((9, 12, 10))
    requests = [llm.make_request(prompt, GREEDY) for prompt in prompts]
    for request in requests:
        llm.engine.add(request)
    llm.engine.step()
    real = ModelRunner.trunk
    monkeypatch.setattr(ModelRunner, "trunk", lambda *args: (_ for _ in ()).throw(MemoryError("no room")))
    with pytest.raises(MemoryError):
        llm.engine.step()
    monkeypatch.setattr(ModelRunner, "trunk", real)
    assert [r.finished for r in requests] == [True, True, False]
    assert "no room" in requests[0].output().outputs[0].error
    run(llm.engine)
    assert requests[2].answers[0].token_ids == without_cache(model, prompts[2], 12)
    llm.engine.check_integrity()


def test_an_interrupt_in_a_step_loses_no_request(model, monkeypatch):
    """Ctrl-C anywhere: whoever goes on stepping gets the same answers."""
    prompts = token_prompts((9, 30, 10))
    for at in (1, 3, 6):
        for name in ("_sample", "_accept", "_score_prompts"):
            llm = with_options(model, max_step_tokens=16)
            calls = itertools.count()
            real = getattr(Engine, name)

            def interrupted(self, *args, real=real, calls=calls, at=at):
                if next(calls) == at:
                    raise KeyboardInterrupt
                return real(self, *args)

            requests = [llm.make_request(prompt, GREEDY) for prompt in prompts]
            for request in requests:
                llm.engine.add(request)
            with monkeypatch.context() as patch:
                patch.setattr(Engine, name, interrupted)
                with pytest.raises(KeyboardInterrupt):
                    run(llm.engine)
                run(llm.engine)
            for request, prompt in zip(requests, prompts, strict=True):
                assert request.answers[0].token_ids == without_cache(model, prompt, 12)


def test_ids_in_use_are_refused(model):
    llm = with_options(model)
    llm.engine.add(llm.make_request([5], GREEDY, request_id="a"))
    with pytest.raises(UserError, match="'a' is in use"):
        llm.engine.add(llm.make_request([5], GREEDY, request_id="a"))


def test_a_model_that_learns_between_calls_is_not_served_old_latents(make_model):
    model = make_model("V3")
    llm = LLM.from_model(model)
    prompt = token_prompts((40,))[0]
    assert llm.generate(prompt, GREEDY)[0].outputs[0].token_ids == without_cache(model, prompt, 12)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.05)
    again = llm.generate([prompt, prompt], GREEDY)
    assert [output.outputs[0].token_ids for output in again] == [without_cache(model, prompt, 12)] * 2
    assert again[0].num_cached_tokens == 0


def test_salts_keep_prompts_apart(model):
    llm = with_options(model)
    prompt = token_prompts((40,))[0]
    cached = []
    for salt in ("a", "b", "a"):
        request = llm.make_request(prompt, GREEDY, cache_salt=salt)
        llm.engine.add(request)
        run(llm.engine)
        cached.append(request.output().num_cached_tokens)
    assert cached == [0, 0, 32]


def broken(*_):
    raise ZeroDivisionError("as a bug of ours would be")


def random_request(llm, draw, beginnings):
    prompt = (
        draw.choice(beginnings)[: draw.randrange(1, 40)] + token_prompts((draw.randrange(1, 6),), draw.randrange(99))[0]
    )
    params = SamplingParams(
        seed=draw.randrange(100),
        temperature=draw.choice([0, 0.8]),
        n=draw.choice([1, 1, 1, 3]),
        max_tokens=draw.randrange(1, 30),
        prompt_logprobs=draw.choice([None, None, 1]),
        stop=draw.choice([None, ["e"]]),
        repetition_penalty=draw.choice([1.0, 1.2]),
    )
    return llm.make_request(prompt, params, cache_salt=draw.choice(["", "x"]))


def test_hundreds_of_random_requests_leave_the_pool_whole(make_model, tokenizer):
    """Lengths, n, drafts, scores, aborts, errors and exceptions at random, in a pool that is far too small. Those that
    end by themselves have the answer that the same request gets alone."""
    model = make_model("V3", num_nextn_predict_layers=1)
    draw = random.Random(3)
    options = {"block_size": 4, "max_num_seqs": 8, "max_step_tokens": 40}
    llm = with_options(model, tokenizer, cache_gib=gib_for(model, 4 * 24, 1), **options)
    engine = llm.engine
    beginnings = token_prompts((24, 40, 9))
    open_now, ended = [], []
    while len(ended) < 300:
        while len(open_now) < 14 and draw.random() < 0.6:
            open_now.append(random_request(llm, draw, beginnings))
            engine.add(open_now[-1])
        if draw.random() < 0.1:
            engine.abort(draw.choice(open_now).request_id)
        running = engine._scheduler.running
        if running and draw.random() < 0.03:
            draw.choice(running).sampling.commit = broken
        if running and draw.random() < 0.005:
            draw.choice(running).sampling.uniform = broken
        try:
            engine.step()
        except ZeroDivisionError:
            assert all(not answer.blocks for answer in running)
        engine.check_integrity()
        ended += [request for request in open_now if request.finished]
        open_now = [request for request in open_now if not request.finished]
    for request in open_now:
        engine.abort(request.request_id)
    engine.check_integrity()
    assert not engine.unfinished
    assert engine.stats.blocks_used == 0
    assert engine.stats.preemptions > 30
    assert engine.stats.prefix_hit_tokens > 200
    reasons = [answer.finish_reason for request in ended for answer in request.answers]
    assert min(reasons.count(reason) for reason in ("stop", "length", "abort", "error")) > 5
    alone = with_options(model, tokenizer, num_speculative_tokens=0)
    whole = [request for request in ended if all(a.finish_reason in ("stop", "length") for a in request.answers)]
    for request in draw.sample(whole, 25):
        expected = alone.generate(request.prompt_token_ids, request.params)[0]
        assert [a.token_ids for a in request.output().outputs] == [a.token_ids for a in expected.outputs]
