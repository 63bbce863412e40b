"""AsyncEngine: parts of many requests at once, every way of leaving, errors, threads that come and go."""

import asyncio
import gc
import threading
import time

import pytest

from fireflyer import LLM, SamplingParams, UserError
from fireflyer.infer.async_engine import AsyncEngine
from fireflyer.infer.engine import Engine
from fireflyer.infer.options import EngineOptions

LONG = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)


@pytest.fixture
def llm(make_model, tokenizer):
    llm = LLM.from_model(make_model("V3", num_nextn_predict_layers=1), tokenizer, options=EngineOptions(max_num_seqs=6))
    llm._weights_may_change = False
    return llm


@pytest.fixture
def slow(monkeypatch):
    """Steps of at least 10 ms; their number so far."""
    real, steps = Engine.step, []

    def step(engine):
        steps.append(1)
        time.sleep(0.01)
        return real(engine)

    monkeypatch.setattr(Engine, "step", step)
    return steps


async def collect(parts):
    return [part async for part in parts]


async def quiet(engine, timeout_s=5.0):
    """Wait until the engine's thread has ended."""
    until = time.monotonic() + timeout_s
    while engine._thread is not None:
        assert time.monotonic() < until, "the engine's thread goes on"
        await asyncio.sleep(0.005)


def test_many_requests_at_once_are_each_as_alone(llm):
    """Texts, n answers, seeds, more than run together; joined parts are the whole answer."""
    prompts = ["the fox", "über", [5, 6, 7], "the dog", [9], "quick", "lazy 漢字", [8] * 20]
    params = [SamplingParams(seed=i, n=1 + i % 2, max_tokens=10 + i, ignore_eos=True) for i in range(len(prompts))]
    expected = llm.generate(prompts, params)
    engine = AsyncEngine(llm)

    async def run():
        streams = [engine.generate(p, one) for p, one in zip(prompts, params, strict=True)]
        return await asyncio.gather(*map(collect, streams))

    for parts, whole in zip(asyncio.run(run()), expected, strict=True):
        for answer in whole.outputs:
            own = [part for part in parts if part.index == answer.index]
            assert "".join(part.text for part in own) == answer.text
            assert [token for part in own for token in part.token_ids] == answer.token_ids
            assert [part.finish_reason for part in own[:-1]] == [None] * (len(own) - 1)
            assert own[-1].finish_reason == "length"
    assert engine.stats().running == engine.stats().waiting == 0


def test_the_thread_ends_with_the_work_and_comes_back(llm):
    engine = AsyncEngine(llm)
    checked = []
    real = llm.engine.check_integrity
    llm.engine.check_integrity = lambda: checked.append(1) or real()

    async def run():
        for _ in range(3):
            assert len(await collect(engine.generate([5], SamplingParams(max_tokens=3, ignore_eos=True)))) >= 1
            await quiet(engine)

    asyncio.run(run())
    asyncio.run(run())  # another event loop
    assert len(checked) >= 6  # the pool is looked through whenever it falls idle
    assert not [thread for thread in threading.enumerate() if thread.name == "fireflyer-engine"]


async def left_by_break(engine):
    async for _ in engine.generate([5], LONG):
        break


async def left_by_closing(engine):
    parts = engine.generate([5], LONG)
    await anext(parts)
    await parts.aclose()


async def left_by_dropping(engine):
    parts = engine.generate([5], LONG)
    await anext(parts)
    del parts
    gc.collect()


async def left_by_cancelling(engine):
    task = asyncio.create_task(collect(engine.generate([5], LONG)))
    await asyncio.sleep(0.03)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def left_by_a_task_that_never_ran(engine):
    task = asyncio.create_task(collect(engine.generate([5], LONG)))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    del task


async def left_by_abort(engine):
    parts = engine.generate([5], LONG, request_id="mine")
    await anext(parts)
    engine.abort("mine")
    engine.abort("nobody's")
    assert (await collect(parts))[-1].finish_reason == "abort"


@pytest.mark.parametrize(
    "leave",
    [
        left_by_break,
        left_by_closing,
        left_by_dropping,
        left_by_cancelling,
        left_by_a_task_that_never_ran,
        left_by_abort,
    ],
)
def test_leaving_ends_the_request_within_a_step(leave, llm, slow):
    engine = AsyncEngine(llm)

    async def run():
        await leave(engine)
        left_at = len(slow)
        await quiet(engine)
        assert len(slow) <= left_at + 2  # the one that runs, and one that had begun to look at what came

    asyncio.run(run())
    assert llm.engine.stats.blocks_used == 0
    assert not llm.engine.unfinished


def test_a_loop_that_closes_takes_its_requests_along(llm, slow):
    engine = AsyncEngine(llm)

    async def begin():
        parts = engine.generate([5], LONG)
        await anext(parts)
        return parts

    parts = asyncio.run(begin())
    asyncio.run(quiet(engine))
    assert len(slow) < 20
    assert parts is not None


def test_others_go_on_when_one_leaves(llm, slow):
    engine = AsyncEngine(llm)
    params = SamplingParams(seed=4, max_tokens=25, ignore_eos=True)
    alone = llm.generate("the fox", params)[0].outputs[0].token_ids

    async def run():
        stays = asyncio.create_task(collect(engine.generate("the fox", params)))
        for _ in range(4):
            await left_by_break(engine)
        return await stays

    assert [token for part in asyncio.run(run()) for token in part.token_ids] == alone


def test_what_can_not_be_served_is_refused_at_the_call(llm):
    engine = AsyncEngine(llm)

    async def run():
        with pytest.raises(UserError, match="token id 300"):
            engine.generate([300], LONG)
        with pytest.raises(UserError, match="160"):
            engine.generate([5] * 160, LONG)
        parts = engine.generate([5], LONG, request_id="a")
        with pytest.raises(UserError, match="'a' is in use"):
            engine.generate([5], LONG, request_id="a")
        await parts.aclose()
        await quiet(engine)
        assert (await collect(engine.generate([5], SamplingParams(max_tokens=2), request_id="a")))[-1].finish_reason

    asyncio.run(run())


def test_a_step_that_fails_ends_its_requests_and_no_others(llm, monkeypatch):
    engine = AsyncEngine(llm)
    real, calls = Engine._score_prompts, []

    def failing(self, batch, hidden):
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError("no room")
        return real(self, batch, hidden)

    monkeypatch.setattr(Engine, "_score_prompts", failing)

    async def run():
        with llm.lock:  # both are there before the third step
            streams = [engine.generate([token], LONG) for token in (5, 6)]
        first = await asyncio.gather(*map(collect, streams))
        return first, await collect(engine.generate([7], SamplingParams(max_tokens=4, ignore_eos=True)))

    first, later = asyncio.run(run())
    for parts in first:
        assert parts[-1].finish_reason == "error"
        assert "no room" in parts[-1].error
    assert later[-1].finish_reason == "length"
    llm.engine.check_integrity()


def test_closing_ends_what_runs_and_takes_nothing_more(llm, slow):
    engine = AsyncEngine(llm)

    async def run():
        task = asyncio.create_task(collect(engine.generate([5], LONG)))
        await asyncio.sleep(0.05)
        await engine.close()
        assert (await task)[-1].finish_reason == "abort"
        with pytest.raises(UserError, match="closed"):
            engine.generate([5], LONG)

    asyncio.run(run())
    assert not llm.engine.unfinished


def test_the_llm_may_be_used_beside_it(llm):
    engine = AsyncEngine(llm)
    params = SamplingParams(seed=1, max_tokens=30, ignore_eos=True)
    alone = llm.generate(["the", "fox"], params)

    async def run():
        parts = asyncio.create_task(collect(engine.generate("the", params)))
        beside = await asyncio.to_thread(llm.generate, "fox", params)
        return await parts, beside

    parts, beside = asyncio.run(run())
    assert [token for part in parts for token in part.token_ids] == alone[0].outputs[0].token_ids
    assert beside[0].outputs[0].token_ids == alone[1].outputs[0].token_ids


def test_a_stream_asked_for_outside_of_a_loop_begins_with_its_first_part(llm):
    parts = llm.stream("the", SamplingParams(max_tokens=4, ignore_eos=True))
    assert not llm.engine.unfinished
    assert sum(len(part.token_ids) for part in asyncio.run(collect(parts))) == 4
