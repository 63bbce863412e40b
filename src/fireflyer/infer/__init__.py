"""Generation: a checkpoint and prompts in, tokens and text out.

Reading order: sampling_params, sampler, output_text, request, model_runner, engine, llm.

Shape suffixes: B rows (sequences) · S rows that sample · T tokens of a call · V vocabulary · K most probable of it
    D hidden_size
"""
