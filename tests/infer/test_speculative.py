"""Drafts against the plain model's own MTP logits; answers with and without drafts; what must break acceptance."""

import math
from dataclasses import replace

import pytest
import torch

from fireflyer import LLM, SamplingParams, UserError
from fireflyer.infer import speculative
from fireflyer.infer.engine import Engine
from fireflyer.infer.native_trunk import NativeRows
from fireflyer.infer.options import EngineOptions
from fireflyer.infer.paged_cache import PagedCache, slot_bytes
from fireflyer.infer.speculative import Drafter

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


def speculating(model, num, tokenizer=None, **options):
    llm = LLM.from_model(model, tokenizer, options=EngineOptions(num_speculative_tokens=num, **options))
    llm._weights_may_change = False  # calls may find each other's blocks
    return llm


def prompts_of(count, length=6, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return [[0, *torch.randint(10, 70, (length,), generator=generator).tolist()] for _ in range(count)]


def acceptance(outputs):
    drafted = sum(output.num_drafted for output in outputs)
    return sum(output.num_accepted for output in outputs) / drafted


def tokens_of(outputs):
    return [answer.token_ids for output in outputs for answer in output.outputs]


@torch.no_grad()
def expected_drafts(model, tokens, count):
    """From the plain model alone: depth k, shown tokens and earlier drafts, at its row for the last known token.

    Beyond the last depth, its own output takes the place of the main model's hidden state one row on.
    """
    depths = len(model.model.mtp)
    sequence = list(tokens)
    for depth in range(min(count, depths)):
        out = model(torch.tensor([sequence]), num_mtp=depth + 1)
        sequence.append(int(out.mtp_logits[depth][0, -1].argmax()))
    if count > depths:
        # Row by row through the last depth, whose inputs up to the last known token are the true ones.
        trunk = model.trunk(torch.tensor([sequence[: len(tokens) + depths - 1]]), num_mtp=depths)
        before = trunk.hidden_BTD if depths == 1 else trunk.mtp_hidden[depths - 2]
        rows = list(before[0, : len(tokens) - 1])
        for _ in range(count - depths):
            ids = torch.tensor([sequence[depths : depths + len(rows)]])
            hidden = plain_depth(model, depths - 1, torch.stack(rows)[None], ids)
            rows.append(hidden[0, -1])
            ids = torch.tensor([sequence[depths : depths + len(rows)]])
            hidden = plain_depth(model, depths - 1, torch.stack(rows)[None], ids)
            sequence.append(int(model.head(hidden[0, -1]).argmax()))
    return sequence[len(tokens) :]


def plain_depth(model, depth, hidden, ids):
    from fireflyer.model.attention import AttentionGroup

    positions = torch.arange(ids.shape[1])[None]
    group = AttentionGroup(positions, None, None, ids.shape[1], "expanded")
    return model.mtp_step(depth, hidden, ids, positions, (group,))


@pytest.mark.parametrize(("depths", "extra"), [(1, 0), (1, 2), (2, 0), (3, 1)])
def test_drafts_are_those_of_the_plain_model(depths, extra, make_model):
    """After every step, prompts in one piece or several, answers side by side, a prefix hit. An untrained model: any
    wrong row, slot or token gives other drafts."""
    model = make_model("V3", num_nextn_predict_layers=depths)
    prompts = [*prompts_of(2, 39), [0, 11, 12], [5]]
    prompts.append([*prompts[0][:36], 99])
    params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True)
    checked = 0
    for max_step_tokens in (2048, 23):
        engine = speculating(model, depths + extra, max_step_tokens=max_step_tokens, block_size=4).engine
        llm = LLM.from_model(model, options=engine.options)
        llm.engine = engine
        for group in (prompts[:4], prompts[4:]):
            requests = [llm.make_request(prompt, params) for prompt in group]
            for request in requests:
                engine.add(request)
            while engine.unfinished:
                engine.step()
                for answer in engine._scheduler.running:
                    if answer.drafts:
                        assert answer.drafts == expected_drafts(model, answer.tokens, len(answer.drafts))
                        checked += 1
        assert engine.stats.prefix_hit_tokens >= 32
    assert checked > 50


def test_a_trained_model_accepts_its_drafts(trained, successor):
    """Greedy, one depth, both, and chained beyond: the floor of a model that knows what follows."""
    prompts = prompts_of(8)
    plain = speculating(trained, 0).generate(prompts, GREEDY)
    assert plain[0].num_drafted == 0
    for num in (1, 2, 5):
        llm = speculating(trained, num)
        outputs = llm.generate(prompts, GREEDY)
        assert tokens_of(outputs) == tokens_of(plain)
        assert acceptance(outputs) > 0.9, num
        stats = llm.engine.stats
        assert (stats.drafted_tokens, stats.accepted_tokens) == (
            sum(output.num_drafted for output in outputs),
            sum(output.num_accepted for output in outputs),
        )
        assert stats.steps <= math.ceil(24 / (1 + num)) + 3
    tokens = torch.tensor(outputs[0].outputs[0].token_ids)
    assert (successor[tokens[:-1] - 10] == tokens[1:]).float().mean() > 0.9


def test_a_shifted_target_breaks_acceptance(trained, monkeypatch):
    """The control: MTP rows that are shown the token one place too early."""
    real = speculative._token
    monkeypatch.setattr(speculative, "_token", lambda answer, position: real(answer, position - 1))
    outputs = speculating(trained, 1).generate(prompts_of(8), GREEDY)
    assert acceptance(outputs) < 0.5
    monkeypatch.undo()
    assert tokens_of(outputs) == tokens_of(speculating(trained, 0).generate(prompts_of(8), GREEDY))


def test_a_wrong_block_table_breaks_acceptance_or_answers(make_model, monkeypatch):
    """The control of the drafts' test: one answer reads another's block, and the drafts are no longer the model's."""
    model = make_model("V3", num_nextn_predict_layers=1)
    llm = speculating(model, 1, block_size=4)
    request = llm.make_request(prompts_of(1, 30)[0], GREEDY)
    llm.engine.add(request)
    llm.engine.step()
    llm.engine.step()
    view, of = PagedCache.view, NativeRows.of
    monkeypatch.setattr(PagedCache, "view", lambda self, tables, slots: view(self, [t[::-1] for t in tables], slots))
    monkeypatch.setattr(
        NativeRows, "of", lambda spans, size: replace(rows := of(spans, size), tables=rows.tables.flip(0).contiguous())
    )
    agree = 0
    for _ in range(8):
        llm.engine.step()
        answer = request.answers[0]
        agree += answer.drafts == expected_drafts(model, answer.tokens, len(answer.drafts))
    assert agree < 6


SAMPLED = [
    SamplingParams(seed=1, max_tokens=30, ignore_eos=True),
    SamplingParams(seed=2, temperature=0.7, top_p=0.9, max_tokens=30, ignore_eos=True),
    SamplingParams(seed=3, top_k=3, min_p=0.05, max_tokens=30, ignore_eos=True),
    SamplingParams(seed=4, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.3, max_tokens=30),
    SamplingParams(temperature=0, repetition_penalty=1.5, max_tokens=30, ignore_eos=True),
    SamplingParams(seed=6, logit_bias={20: 5.0, 33: -100.0}, max_tokens=30, ignore_eos=True),
    SamplingParams(seed=7, stop_token_ids=[30, 31, 32, 33], min_tokens=9, max_tokens=30),
    SamplingParams(seed=8, n=3, max_tokens=20, logprobs=2, ignore_eos=True),
    SamplingParams(temperature=0, max_tokens=1, ignore_eos=True),
    SamplingParams(temperature=0, max_tokens=2, ignore_eos=True),
]


@pytest.mark.parametrize("num", [1, 2, 4])
def test_the_same_seed_gives_the_same_tokens_with_and_without_drafts(num, trained):
    """Penalties, biases, filters, minimal lengths, ends: all in one batch, then in a pool that is too small for it.

    Near-ties could differ by rounding; in these 400 tokens there is none.
    """
    prompts = prompts_of(len(SAMPLED))
    plain = speculating(trained, 0).generate(prompts, SAMPLED)
    slots = 16 * 9
    few = slot_bytes(2 + min(num, 2), 20, torch.float32) * slots / 2**30
    for options in ({}, {"cache_gib": few, "block_size": 4}, {"max_num_seqs": 2, "max_step_tokens": 5}):
        llm = speculating(trained, num, **options)
        outputs = llm.generate(prompts, SAMPLED)
        assert tokens_of(outputs) == tokens_of(plain)
        reasons = [(a.finish_reason, a.stop_reason) for output in outputs for a in output.outputs]
        assert reasons == [(a.finish_reason, a.stop_reason) for output in plain for a in output.outputs]
        for mine, theirs in zip(outputs[7].outputs, plain[7].outputs, strict=True):
            assert [list(row) for row in mine.logprobs] == [list(row) for row in theirs.logprobs]
            for a, b in zip(mine.logprobs, theirs.logprobs, strict=True):
                assert all(math.isclose(a[t].logprob, b[t].logprob, abs_tol=1e-4) for t in a)
        assert sum(output.num_accepted for output in outputs) > 50 or "max_step_tokens" in options
        if "cache_gib" in options:
            assert llm.engine.stats.preemptions > 0
        llm.engine.check_integrity()


def test_stop_strings_and_grammars_are_the_same_with_drafts(trained, tokenizer):
    pytest.importorskip("llguidance")
    params = [
        SamplingParams(seed=1, max_tokens=40, stop=["a", "the"]),
        SamplingParams(seed=2, max_tokens=40, response_format={"type": "choice", "choices": ["yes", "no", "nothing"]}),
        SamplingParams(seed=3, max_tokens=40, response_format={"type": "regex", "pattern": "[a-c]{5,9}"}),
    ]
    plain = speculating(trained, 0, tokenizer).generate(["fox", "dog", "the"], params)
    drafted = speculating(trained, 2, tokenizer).generate(["fox", "dog", "the"], params)
    assert tokens_of(plain) == tokens_of(drafted)
    assert [o.outputs[0].text for o in plain] == [o.outputs[0].text for o in drafted]
    assert plain[1].outputs[0].text in ("yes", "no", "nothing")


def test_the_distribution_is_that_without_drafts(trained):
    """The third token after a prompt, over 3,000 seeds of a hot, filtered request, against its exact distribution.

    With two drafts this token is either an accepted draft, or drawn after a refused one, or the first of its step.
    """
    prompt = [0, 20, 21]
    params = [SamplingParams(seed=s, temperature=1.6, top_k=3, max_tokens=3, ignore_eos=True) for s in range(3000)]
    llm = speculating(trained, 2, max_num_seqs=512)
    outputs = llm.generate([prompt] * len(params), params)
    assert 0.05 < acceptance(outputs) < 0.95

    def next_probabilities(tokens):
        with torch.no_grad():
            logits = trained(torch.tensor([tokens])).logits[0, -1].double() / 1.6
        top = logits.topk(3)
        return dict(zip(top.indices.tolist(), top.values.softmax(-1).tolist(), strict=True))

    exact: dict[int, float] = {}
    for first, p in next_probabilities(prompt).items():
        for second, q in next_probabilities([*prompt, first]).items():
            for third, r in next_probabilities([*prompt, first, second]).items():
                exact[third] = exact.get(third, 0.0) + p * q * r
    counts: dict[int, int] = {}
    for output in outputs:
        third = output.outputs[0].token_ids[2]
        counts[third] = counts.get(third, 0) + 1
    assert set(counts) <= set(exact)
    cells = [(counts.get(token, 0), 3000 * p) for token, p in exact.items() if 3000 * p >= 5]
    chi_square = sum((count - expected) ** 2 / expected for count, expected in cells)
    freedom = len(cells) - 1
    limit = freedom * (1 - 2 / (9 * freedom) + 3.719 * math.sqrt(2 / (9 * freedom))) ** 3  # exceeded once in 10,000
    assert freedom >= 5
    assert chi_square < limit


def test_accepting_what_was_not_drawn_is_seen_by_these_tests(trained, monkeypatch):
    """The control: drafts that are taken on trust change seeded answers."""
    plain = speculating(trained, 0).generate(prompts_of(4), SAMPLED[0])

    def trusting(self, answer, sampled, experts):
        for place, draft in enumerate(answer.drafts):
            sampled[place] = sampled[place]._replace(token_id=draft)
        return real(self, answer, sampled, experts)

    real = Engine._accept
    monkeypatch.setattr(Engine, "_accept", trusting)
    assert tokens_of(speculating(trained, 1).generate(prompts_of(4), SAMPLED[0])) != tokens_of(plain)


def test_a_prefix_hit_leaves_acceptance_right(trained):
    """The last block of a hit is computed again: its MTP rows depend on what follows in the other prompt."""
    shared = prompts_of(1, 40)[0]
    llm = speculating(trained, 2, block_size=8)
    llm.generate([*shared, 11], GREEDY)
    hit = llm.generate([*shared, 44, 45], GREEDY)[0]
    cold = speculating(trained, 2, block_size=8).generate([*shared, 44, 45], GREEDY)[0]
    assert hit.num_cached_tokens == 32
    assert cold.num_cached_tokens == 0
    assert tokens_of([hit]) == tokens_of([cold])
    assert (hit.num_drafted, hit.num_accepted) == (cold.num_drafted, cold.num_accepted)


def test_parts_say_what_was_drafted(trained):
    parts = list(speculating(trained, 2).stream_sync(prompts_of(1)[0], GREEDY))
    flags = [flag for part in parts if part.drafted for flag in part.drafted]
    assert sum(len(part.token_ids) for part in parts) == 24
    assert flags.count(True) > 12
    assert all(part.drafted is None for part in speculating(trained, 0).stream_sync(prompts_of(1)[0], GREEDY))


def test_no_drafts_where_they_can_not_be_said(trained, monkeypatch):
    """Neither the last token of an answer nor any after it is drafted, and positions end with the context."""
    most: list[int] = []
    draft = Drafter.draft

    def watched(self, batch, hidden_ND):
        draft(self, batch, hidden_ND)
        for span in batch.spans:
            answer = span.answer
            room = answer.request.max_new_tokens - answer.num_written
            most.append(len(answer.drafts) - max(room - 1, 0))

    monkeypatch.setattr(Drafter, "draft", watched)
    llm = speculating(trained, 4, max_length=20)
    outputs = llm.generate(prompts_of(3), [GREEDY, SamplingParams(max_tokens=None, ignore_eos=True), GREEDY])
    assert [len(output.outputs[0].token_ids) for output in outputs] == [13, 13, 13]
    assert max(most) <= 0


def test_a_model_without_mtp_layers(model):
    assert LLM.from_model(model).engine._num_drafts == 0
    with pytest.raises(UserError, match="num_speculative_tokens is 2, but the model has no MTP layer"):
        speculating(model, 2)
