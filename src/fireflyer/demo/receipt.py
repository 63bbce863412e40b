"""The bill of a demo as lines of text: what was learnt, what it took, the same sum at V3's size, what to try next."""

from __future__ import annotations

from pathlib import Path

from fireflyer.config import load_config
from fireflyer.cost import v3_run
from fireflyer.cost.flops import training_flops_per_token
from fireflyer.demo.bill import Bill
from fireflyer.demo.run import DemoSummary


def receipt(summary: DemoSummary, run_dir: Path) -> list[str]:
    """Plain lines, at most 80 characters wide but for the examples."""
    return [*_learnt(summary), "", *bill_lines(summary), "", *_at_v3_size(), "", *_next(summary, run_dir)]


def _learnt(s: DemoSummary) -> list[str]:
    lines = [
        f"{s.accuracy:.1%} of {s.held_out:,} problems it never saw are exactly right",
        f"  {s.correct_sums} of {s.sums} sums, {s.correct_differences} of {s.differences} differences; "
        f"{s.correct_two_eight_digit_numbers} of the {s.two_eight_digit_numbers} with two 8-digit numbers",
        f"  experts: the busiest has {1 + s.max_vio:.2f} times the mean load; "
        f"MTP: {s.mtp_acceptance:.1%} of drafts accepted",
    ]
    lines += [f"  {'ok   ' if e['right'] else 'wrong'} {e['prompt']} {e['answer']}" for e in s.examples]
    return lines


def bill_lines(s: Bill) -> list[str]:
    """What it took."""
    return [
        "Receipt",
        f"  {s.parameters:,} parameters, {s.tokens:,} tokens",
        f"  {s.flops:.3g} FLOPs in {s.train_s:.0f} s: {s.flops / s.train_s / 1e9:.0f} GFLOP/s, "
        f"{s.mfu:.0%} of this machine's {s.matmul_flops_per_s / 1e9:.0f} (MFU)",
        f"  {s.train_s / 3600:.4f} device-hours at ${s.usd_per_hour:.2f} an hour: ${s.usd:.4f}",
    ]


def _at_v3_size() -> list[str]:
    flops_per_token = training_flops_per_token(load_config("deepseek-v3"), v3_run.SEQ_LEN)
    hours, speed = v3_run.pretraining_gpu_hours(), v3_run.tokens_per_s_per_gpu()
    return [
        "The same sum at DeepSeek-V3's size (its report's figures)",
        f"  671B parameters, {v3_run.PRETRAINING_TOKENS / 1e12:.1f}T tokens, "
        f"{flops_per_token * v3_run.PRETRAINING_TOKENS:.3g} FLOPs",
        f"  {hours / 1e6:.3f}M H800 hours at {speed:,.0f} tokens/s each: "
        f"{flops_per_token * speed / v3_run.H800_BF16_FLOPS_PER_S:.0%} of the BF16 peak (MFU)",
        f"  at ${v3_run.USD_PER_GPU_HOUR:.2f} an hour: ${v3_run.usd(hours) / 1e6:.3f}M; with context extension and"
        f" post-training ${v3_run.usd(v3_run.total_gpu_hours()) / 1e6:.3f}M",
    ]


def _next(s: DemoSummary, run_dir: Path) -> list[str]:
    return [
        "Try next",
        f'  fireflyer generate {run_dir} "{s.examples[0]["prompt"]}" --temperature 0',
        "  fireflyer pretrain --data YOUR_FOLDER --run runs/mine",
        f"  fireflyer export {run_dir} my-checkpoint",
    ]
