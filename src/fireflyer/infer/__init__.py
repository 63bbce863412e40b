"""Generation: a checkpoint and prompts in, tokens and text out.

Reading order: response_format, sampling_params, penalties, structured_output, sampling_state, logprobs, sampler,
output_text, outputs; options, block_pool, prefix_cache, paged_cache, request, scheduler, model_runner, speculative,
stats, engine; async_engine, llm.

Shape suffixes: B rows (sequences) · T tokens of a call · S cache slots · C numbers a slot keeps · N rows of a step
    V vocabulary · K most probable of it · D hidden_size
"""
