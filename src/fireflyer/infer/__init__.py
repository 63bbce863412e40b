"""Generation: a checkpoint and prompts in, tokens and text out.

Reading order: response_format, sampling_params, penalties, structured_output, sampling_state, logprobs, sampler,
output_text, request, model_runner, engine, llm.

Shape suffixes: B rows (sequences) · T tokens of a call · V vocabulary · K most probable of it · D hidden_size
"""
