"""What vLLM's CPU build does with the same weights and requests; run by the Python that FIREFLYER_VLLM_PYTHON names.

`python benchmarks/_vllm.py CHECKPOINT REQUESTS.json`: prints one JSON object. bfloat16, since its experts know no fp32
on a CPU, and without its latent attention, whose CPU form takes DeepSeek's own head width alone.
"""

import json
import os
import sys
import time

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "2",
    "VLLM_CPU_OMP_THREADS_BIND": "0-1",
    "VLLM_MLA_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


def main() -> None:
    """Decode rates of equal prompts, and the throughput of all requests at once."""
    from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]

    with open(sys.argv[2], encoding="utf-8") as file:
        work = json.load(file)
    llm = LLM(sys.argv[1], skip_tokenizer_init=True, dtype="bfloat16", enforce_eager=True, max_model_len=1024)

    def seconds(prompts: list[list[int]], lengths: list[int]) -> float:
        params = [
            SamplingParams(max_tokens=length, temperature=0.0, ignore_eos=True, detokenize=False) for length in lengths
        ]
        began = time.perf_counter()
        llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        return time.perf_counter() - began

    found: dict[str, float] = {}
    prompts = work["prompts"]
    for batch in (1, 16):
        seconds(prompts[:batch], [4] * batch)
        times = []
        for repeat in range(3):
            part = prompts[(repeat + 1) * 16 :][:batch]  # fresh ones, or its prefix cache would have read them
            first = seconds(part, [1] * batch)
            times.append((seconds(part, [work["new_tokens"]] * batch) - first) / (work["new_tokens"] - 1))
        found[f"decode_tokens_per_s_{batch}"] = batch / sorted(times)[1]
    took = seconds([request["prompt"] for request in work["requests"]], [r["new_tokens"] for r in work["requests"]])
    found["requests_tokens_per_s"] = sum(request["new_tokens"] for request in work["requests"]) / took
    print(json.dumps(found))


if __name__ == "__main__":
    main()
