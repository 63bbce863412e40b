"""The architecture: token ids (or embeddings) in, hidden states, logits and routing out.

No files, no parallelism, no globals.

Reading order: rope, norm, attention, routing, experts, mtp, decoder; cache beside them.

Shape suffixes used in this package:
    B batch · T tokens of this call · S cache slots · N = B*T rows · D hidden_size · H heads
    P qk_nope_head_dim · R qk_rope_head_dim · Q = P + R · V v_head_dim · L kv_lora_rank · C = L + R (what a cache keeps)
    E routed experts · K experts per token · I expert width · G groups · M = N*K dispatched rows
"""
