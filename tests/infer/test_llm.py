"""LLM against a loop without any cache and against transformers' generate; batches, seeds, ends, refusals."""

import asyncio
import json
import time

import pytest
import torch

from fireflyer import LLM, SamplingParams, UserError, save_model
from fireflyer.checkpoint.run import write_checkpoint
from fireflyer.infer.engine import Engine

VOCAB_SIZE = 300

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)

# Ragged, from one token to more than twice the 16 positions of the original rope.
LENGTHS = (1, 40, 7, 25, 3, 12)


def token_prompts(lengths=LENGTHS, seed=7):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]


def without_cache(model, prompt, num_tokens):
    """The definition: the whole sequence through the decoder for every token."""
    sequence = list(prompt)
    for _ in range(num_tokens):
        sequence.append(int(model(torch.tensor([sequence])).logits[0, -1].argmax()))
    return sequence[len(prompt) :]


@pytest.mark.parametrize("max_num_seqs", [1, 2, 64])
def test_greedy_equals_the_loop_without_a_cache(model, max_num_seqs):
    """Alone, in small batches where rows free up and are filled again, and all together."""
    prompts = token_prompts()
    params = [SamplingParams(temperature=0, max_tokens=count, ignore_eos=True) for count in (24, 5, 1, 17, 24, 9)]
    outputs = LLM.from_model(model, max_num_seqs=max_num_seqs).generate(prompts, params)
    for prompt, one, output in zip(prompts, params, outputs, strict=True):
        assert output.prompt is None
        assert output.prompt_token_ids == prompt
        assert output.outputs[0].token_ids == without_cache(model, prompt, one.max_tokens)
        assert output.outputs[0].finish_reason == "length"


@pytest.mark.parametrize("kind", ["V3", "V2"])
def test_greedy_equals_transformers(kind, make_model, tmp_path):
    """The same folder in both, prompts beyond the original rope, prefill in pieces and in one."""
    transformers = pytest.importorskip("transformers")
    save_model(make_model(kind, seed=1), tmp_path / "tiny")
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "tiny", dtype=torch.float32)
    prompts = token_prompts()
    for max_step_tokens in (2048, 30):
        llm = LLM(tmp_path / "tiny", max_step_tokens=max_step_tokens)
        for prompt, output in zip(prompts, llm.generate(prompts, GREEDY), strict=True):
            ids = torch.tensor([prompt])
            theirs = peer.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=24,
                min_new_tokens=24,
                pad_token_id=0,
                eos_token_id=VOCAB_SIZE + 1,
            )
            assert output.outputs[0].token_ids == theirs[0, len(prompt) :].tolist()


def test_a_seed_gives_the_same_tokens_alone_and_in_a_crowd(model):
    llm = LLM.from_model(model, max_num_seqs=3)
    prompt, *others = token_prompts((6, 30, 2, 15))
    seeded = SamplingParams(seed=11, temperature=0.9, top_p=0.95, max_tokens=30, ignore_eos=True)
    alone = llm.generate(prompt, seeded)[0].outputs[0].token_ids
    crowd = [SamplingParams(max_tokens=12), SamplingParams(temperature=0), SamplingParams(seed=11, top_k=9)]
    together = llm.generate([*others, prompt], [*crowd, seeded])[-1].outputs[0].token_ids
    assert together == alone
    assert llm.generate(prompt, seeded)[0].outputs[0].token_ids == alone
    other_seed = SamplingParams(seed=-11, temperature=0.9, top_p=0.95, max_tokens=30, ignore_eos=True)
    assert llm.generate(prompt, other_seed)[0].outputs[0].token_ids != alone
    unseeded = SamplingParams(max_tokens=30, ignore_eos=True)
    first, second = (llm.generate(prompt, unseeded)[0].outputs[0].token_ids for _ in range(2))
    assert first != second


def test_end_token_and_stop_tokens(model, make_model, tokenizer):
    prompt = token_prompts((6,))[0]
    tokens = without_cache(model, prompt, 8)
    ending = make_model("V3", eos_token_id=[tokens[3], 299])
    llm = LLM.from_model(ending, tokenizer)
    first = tokens.index(tokens[3])
    ended = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=8))[0].outputs[0]
    assert ended.token_ids == tokens[: first + 1]
    assert (ended.finish_reason, ended.stop_reason) == ("stop", None)
    assert ended.text == tokenizer.decode(tokens[:first])
    assert llm.generate(prompt, GREEDY)[0].outputs[0].token_ids[:8] == tokens
    stopped = llm.generate(
        prompt, SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, stop_token_ids=[tokens[2]])
    )[0].outputs[0]
    second = tokens.index(tokens[2])
    assert stopped.token_ids == tokens[: second + 1]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", tokens[2])
    assert stopped.text == tokenizer.decode(tokens[:second])


def test_end_tokens_of_generation_config(model, tmp_path):
    prompt = token_prompts((6,))[0]
    tokens = without_cache(model, prompt, 8)
    save_model(model, tmp_path / "tiny")
    (tmp_path / "tiny" / "generation_config.json").write_text(json.dumps({"eos_token_id": tokens[4]}))
    ended = LLM(tmp_path / "tiny").generate(prompt, SamplingParams(temperature=0, max_tokens=8))[0].outputs[0]
    assert ended.token_ids == tokens[: tokens.index(tokens[4]) + 1]
    for wrong in ("[]", '{"eos_token_id": "</s>"}', '{"eos_token_id": 1.5}', "{"):
        (tmp_path / "tiny" / "generation_config.json").write_text(wrong)
        with pytest.raises(UserError, match="generation_config"):
            LLM(tmp_path / "tiny")


def test_a_run_folder_means_its_newest_checkpoint(model, tokenizer, tmp_path):
    def write(folder):
        save_model(model, folder / "tiny")
        tokenizer.save(folder / "tiny")
        for file in (folder / "tiny").iterdir():
            file.rename(folder / file.name)
        (folder / "tiny").rmdir()

    write_checkpoint(tmp_path / "run", 3, write)
    output = LLM(tmp_path / "run").generate("the fox", GREEDY)[0]
    assert output.outputs[0].token_ids == without_cache(model, output.prompt_token_ids, 24)


def test_bfloat16(model, tmp_path):
    """The first tokens are those of the bf16 decoder without a cache; one near-tie may fall the other way."""
    save_model(model, tmp_path / "tiny")
    llm = LLM(tmp_path / "tiny", dtype=torch.bfloat16)
    assert llm.model.head_weight.dtype == torch.bfloat16
    prompts = token_prompts()
    outputs = llm.generate(prompts, GREEDY)
    same = [
        out.outputs[0].token_ids[:1] == without_cache(llm.model, p, 1) for p, out in zip(prompts, outputs, strict=True)
    ]
    assert sum(same) >= len(prompts) - 1


def test_stop_strings_end_the_text_before_them(model, tokenizer):
    llm = LLM.from_model(model, tokenizer)
    free = llm.generate("the quick", GREEDY)[0].outputs[0]
    stop = free.text[5:8]
    output = llm.generate("the quick", SamplingParams(temperature=0, max_tokens=24, ignore_eos=True, stop=stop))[0]
    ended = output.outputs[0]
    assert ended.text == free.text[: free.text.index(stop)]
    assert (ended.finish_reason, ended.stop_reason) == ("stop", stop)
    assert len(ended.token_ids) < 24
    assert ended.token_ids == free.token_ids[: len(ended.token_ids)]


def test_text_prompts_begin_with_one_begin_token(model, tokenizer):
    llm = LLM.from_model(model, tokenizer)
    plain = tokenizer.encode("the fox")
    assert llm.encode_prompt("the fox") == [tokenizer.bos_id, *plain]
    assert llm.encode_prompt("<｜begin▁of▁sentence｜>the fox") == [tokenizer.bos_id, *plain]
    output = llm.generate("the fox", GREEDY)[0]
    assert output.prompt == "the fox"
    assert output.prompt_token_ids == [tokenizer.bos_id, *plain]
    assert output.outputs[0].token_ids == without_cache(model, output.prompt_token_ids, 24)
    assert output.outputs[0].text == tokenizer.decode(output.outputs[0].token_ids)


def test_chat_reads_the_template(model, tokenizer):
    llm = LLM.from_model(model, tokenizer)
    messages = [{"role": "user", "content": "the dog"}]
    expected = tokenizer.encode("<｜begin▁of▁sentence｜><｜User｜>the dog<｜Assistant｜>", allow_special=True)
    one = llm.chat(messages, GREEDY)
    assert one[0].prompt_token_ids == expected
    assert one[0].outputs[0].token_ids == without_cache(model, expected, 24)
    assert [output.prompt_token_ids for output in llm.chat([messages, messages], GREEDY)] == [expected, expected]


def test_a_full_context_ends_with_length_and_an_overfull_one_is_refused(model):
    llm = LLM.from_model(model, max_length=30)
    prompt = token_prompts((26,))[0]
    for max_tokens in (None, 100):
        output = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True))[0]
        assert output.outputs[0].token_ids == without_cache(model, prompt, 4)
        assert output.outputs[0].finish_reason == "length"
    with pytest.raises(UserError, match=r"prompts\[1\]: .*30 tokens.*context of 30"):
        llm.generate([prompt, token_prompts((30,))[0]])
    with pytest.raises(UserError, match="160"):
        LLM.from_model(model, max_length=161)


def test_refusals(model, make_model, tokenizer):
    llm = LLM.from_model(model, tokenizer)
    with pytest.raises(UserError, match=r"prompts\[1\]: .*token id 300.*0 to 299"):
        llm.generate([[5], [5, 300]])
    with pytest.raises(UserError, match=r"prompts\[0\]: .*empty"):
        llm.generate([[]])
    with pytest.raises(UserError, match=r"prompts\[1\]: .*not 1.5"):
        llm.generate(["a", 1.5])  # type: ignore[list-item]
    with pytest.raises(UserError, match="Tensor"):
        llm.generate(torch.tensor([5, 6]))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="not dict"):
        llm.generate([5], [{"temperature": 0}])  # type: ignore[list-item]
    with pytest.raises(UserError, match=r"2 sampling parameters .* 3 prompts"):
        llm.generate([[5], [6], [7]], [GREEDY, GREEDY])
    with pytest.raises(UserError, match="stop_token_ids has 300"):
        llm.generate([5], SamplingParams(stop_token_ids=[300]))
    with pytest.raises(UserError, match="float16"):
        LLM("nowhere", dtype=torch.float16)
    with pytest.raises(UserError, match="nowhere"):
        LLM("nowhere")
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="no CUDA GPU"):
            LLM("nowhere", device="cuda")
    with pytest.raises(UserError, match="belongs to another model"):
        LLM.from_model(make_model("V3", vocab_size=280), tokenizer)
    assert llm.generate([]) == []


def test_without_a_tokenizer_token_ids_still_work(model, tmp_path):
    save_model(model, tmp_path / "tiny")
    llm = LLM(tmp_path / "tiny")
    output = llm.generate([5, 6], GREEDY)[0].outputs[0]
    assert output.text == ""
    assert output.token_ids == without_cache(model, [5, 6], 24)
    assert [part.token_ids for part in llm.stream_sync([5, 6], GREEDY)] == [[token] for token in output.token_ids]
    with pytest.raises(UserError, match=r"no tokenizer.json.*token ids"):
        llm.generate("text", GREEDY)
    with pytest.raises(UserError, match=r"no tokenizer.json.*stop_token_ids"):
        llm.generate([5], SamplingParams(stop="x"))
    with pytest.raises(UserError, match=r"no tokenizer.json"):
        llm.chat([{"role": "user", "content": "hi"}])


def test_a_stream_is_the_answer_in_parts(model, tokenizer):
    llm = LLM.from_model(model, tokenizer)
    params = SamplingParams(seed=3, max_tokens=60, ignore_eos=True)
    whole = llm.generate("über", params)[0].outputs[0]
    parts = list(llm.stream_sync("über", params))
    assert "".join(part.text for part in parts) == whole.text
    assert [token for part in parts for token in part.token_ids] == whole.token_ids
    assert [part.finish_reason for part in parts] == [None] * (len(parts) - 1) + ["length"]
    assert str(parts[0]) == parts[0].text

    async def collect(prompt):
        return [part async for part in llm.stream(prompt, params)]

    async def both():
        return await asyncio.gather(collect("über"), collect("the"))

    streamed, _ = asyncio.run(both())
    assert "".join(part.text for part in streamed) == whole.text
    assert [token for part in streamed for token in part.token_ids] == whole.token_ids
    assert streamed[-1].finish_reason == "length"
    with pytest.raises(UserError, match="token id 300"):
        llm.stream([300])


class SlowSteps:
    """Counts the engine's steps, each of 20 ms at least."""

    def __init__(self, monkeypatch):
        self.count = 0
        step = Engine.step

        def slow(engine):
            self.count += 1
            time.sleep(0.02)
            return step(engine)

        monkeypatch.setattr(Engine, "step", slow)


def test_the_event_loop_stays_free_while_a_stream_runs(model, tokenizer, monkeypatch):
    SlowSteps(monkeypatch)
    llm = LLM.from_model(model, tokenizer)
    ticks = 0

    async def tick():
        nonlocal ticks
        while True:
            await asyncio.sleep(0.002)
            ticks += 1

    async def stream():
        ticker = asyncio.create_task(tick())
        async for _ in llm.stream([5], SamplingParams(max_tokens=10, ignore_eos=True)):
            pass
        ticker.cancel()

    asyncio.run(stream())
    assert ticks > 20


def test_leaving_an_async_stream_ends_it_within_a_step(model, tokenizer, monkeypatch):
    steps = SlowSteps(monkeypatch)
    llm = LLM.from_model(model, tokenizer)

    async def leave():
        async for _ in llm.stream([5], SamplingParams(max_tokens=100, ignore_eos=True)):
            break
        return steps.count

    async def cancel():
        task = asyncio.create_task(leave())
        await asyncio.sleep(0.01)  # in the middle of the first step
        task.cancel()
        await asyncio.sleep(0.2)

    left_at = asyncio.run(leave())
    time.sleep(0.1)
    assert steps.count <= left_at + 1
    before = steps.count
    asyncio.run(cancel())
    assert steps.count <= before + 2  # the one that was cancelled in, and none after the next looked
