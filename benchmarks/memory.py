"""What `inspect --fit` says against what processes take: the peak of one that answers, at each precision and load."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks._result import Proof, Table
from fireflyer import save_model
from fireflyer.checkpoint.packed import plan_packed
from fireflyer.checkpoint.published import open_checkpoint
from fireflyer.config.model_config import load_config
from fireflyer.config.sizes import show_bytes
from fireflyer.model.decoder import Decoder

LOADS = ((1500, 1), (300, 1), (300, 6))
ALLOWED = 0.15

_ANSWER = """
import sys, torch
from pathlib import Path
from fireflyer import LLM, SamplingParams
folder, tokens, batch = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
llm = LLM(folder, dtype=torch.bfloat16 if folder.endswith("bf16") else "auto")
prompts = [[(7 * i + 31 * j) % 16000 for i in range(tokens - 4)] for j in range(batch)]
llm.generate(prompts, SamplingParams(max_tokens=4, ignore_eos=True))
# Not getrusage: its peak begins with that of the process that started this one.
status = Path("/proc/self/status").read_text()
print(int(status.partition("VmHWM:")[2].split()[0]) * 1024)
"""


def main() -> Proof:
    found, rows, missed = [], [], []
    with tempfile.TemporaryDirectory(prefix="fireflyer-memory-") as place:
        folders = _folders(Path(place))
        for context, batch in LOADS:
            facts = _inspect(str(folders["fp32"]), context, batch)["precisions"]
            for precision, folder in folders.items():
                peak = int(_python("-c", _ANSWER, str(folder), str(context), str(batch)))
                estimate = facts[precision]["total_bytes"]
                each = {"precision": precision, "context": context, "batch": batch, "peak": peak, "estimate": estimate}
                found.append(each)
                share = estimate / peak - 1
                rows.append(
                    [precision, f"{batch} × {context:,}", show_bytes(estimate), show_bytes(peak), f"{share:+.0%}"]
                )
                if abs(share) > ALLOWED:
                    missed.append(f"{precision}, {batch} × {context}: {share:+.0%} from the peak, over {ALLOWED:.0%}")
    columns = ["precision", "sequences × tokens", "said", "taken", "difference"]
    said = _python("-m", "fireflyer", "inspect", "deepseek-v2-lite", "--fit")
    shown = said[said.index("this machine") :].rstrip()
    return Proof({"processes": found}, {"peaks": Table(columns, rows)}, {"v2-lite": shown}, missed)


def _folders(place: Path) -> dict[str, Path]:
    """One model of 165 million random weights in each form."""
    config = load_config("deepseek-v3").replace(
        vocab_size=16384, hidden_size=640, intermediate_size=1792, moe_intermediate_size=320, num_hidden_layers=6,
        first_k_dense_replace=1, num_attention_heads=10, q_lora_rank=256, kv_lora_rank=256, qk_nope_head_dim=64,
        qk_rope_head_dim=32, v_head_dim=64, n_routed_experts=40, num_experts_per_tok=6, n_group=1, topk_group=1,
        num_nextn_predict_layers=0, quantization_config=None,
    )  # fmt: skip
    model = Decoder(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.03, 0.03)
    folders = {precision: place / precision for precision in ("fp32", "bf16", "int8", "int4")}
    save_model(model, folders["fp32"])
    save_model(model.bfloat16(), folders["bf16"])
    checkpoint = open_checkpoint(folders["fp32"])
    for kind in ("int8", "int4"):
        folders[kind].mkdir()
        plan_packed(checkpoint.config, checkpoint.tensors, kind).write(folders[kind])
    return folders


def _inspect(folder: str, context: int, batch: int) -> dict[str, Any]:
    options = ("--fit", "--json", "--context", str(context), "--batch", str(batch))
    return json.loads(_python("-m", "fireflyer", "inspect", folder, *options))["fit"]


def _python(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return done.stdout
