"""What `fireflyer plan` says of V3's own run and serving, beside what was published; a step's time by number of GPUs.

Arithmetic only: no clock is read, so the machine does not matter.
"""

from __future__ import annotations

import io
from contextlib import redirect_stdout
from dataclasses import asdict, replace

from benchmarks._chart import Line, log_chart
from benchmarks._result import ROOT, Proof, Table
from fireflyer.cli.main import main as fireflyer
from fireflyer.config import load_config
from fireflyer.cost import production_day, v3_run
from fireflyer.cost.hardware import Gpu, Hardware, Product, load_hardware
from fireflyer.cost.judge import Judge, TrainingPlan
from fireflyer.cost.layout_checks import describe
from fireflyer.cost.layouts import Job, Layout
from fireflyer.cost.plan import search
from fireflyer.cost.serving_plan import ServingJob, plan_serving

V3 = load_config("deepseek-v3")
REPORTED = Layout(16, 128, 1, 64, 1, 1, "selective", "dualpipe", 2)
COUNTS = tuple(2**power for power in range(4, 15))
TOLERANCE = 0.10
PICTURE = "plan-step-time.svg"

# DeepGEMM's later kernels: forward and gradients of inputs from its README, gradients of weights from its pull request
# 95 and issue 107 (TFLOPS on all of an H800's multiprocessors).
LATER_WEIGHT_GRADIENTS = [
    (7168, 2112, 4096, 1, 920),
    (1536, 24576, 4096, 1, 986),
    (512, 32768, 4096, 1, 878),
    (16384, 7168, 4096, 1, 994),
    (7168, 4096, 4096, 1, 942),
    (2048, 7168, 4096, 1, 920),
    (7168, 4096, 8192, 4, 1044),
    (2048, 7168, 8192, 4, 1033),
]


def main() -> Proof:
    """The picture goes to docs/plan-step-time.svg."""
    hardware = load_hardware()
    job = Job(V3, hardware, hardware.gpu("H800"), 2048, 4096, 15360, "fp8")
    as_trained, found = Judge(job)(REPORTED), search(job)
    later = Judge(replace(job, hardware=with_later_kernels(hardware)))(REPORTED)
    assert as_trained is not None
    assert found is not None
    assert later is not None
    plans = {"as_trained": as_trained, "found": found, "later_kernels": later}
    hours = {name: 14.8e12 / plan.tokens_per_s * 2048 / 3600 for name, plan in plans.items()}
    off = {name: value / v3_run.pretraining_gpu_hours() - 1 for name, value in hours.items()}
    steps = sweep(job)
    picture(steps, as_trained)
    served = serving(hardware, job.gpu)
    missed = [
        f"H800 hours of 14.8T tokens within {TOLERANCE:.0%} of 2,664,000, {name}: {hours[name]:,.0f} ({off[name]:+.1%})"
        for name in ("as_trained", "found")
        if abs(off[name]) > TOLERANCE
    ]
    return Proof(
        figures={
            "hours": hours,
            "off": off,
            "plans": {name: _plan_figures(plan) for name, plan in plans.items()},
            "steps": steps,
            "serving": served,
            "day": {
                "cost_usd": production_day.cost_usd(),
                "margin": production_day.margin(production_day.PUBLISHED_REVENUE_USD),
                "margin_from_rounded_tokens": production_day.margin(production_day.revenue_usd()),
            },
        },
        tables={
            "run": _run_table(plans, hours, off),
            "steps": _steps_table(steps),
            "serving": _serving_table(served),
        },
        outputs={"plan": _said("deepseek-v3"), "serve": _said("deepseek-v3", "--serve")},
        missed=missed,
    )


def with_later_kernels(hardware: Hardware) -> Hardware:
    """The same table with the rates of kernels that came after V3's run."""
    gpu = hardware.gpu("H800")

    def share(rows: int, columns: int, depth: int, groups: int, tflops: float) -> Product:
        moved = depth * (rows + columns) + 8.0 * rows * columns
        limit = min(gpu.peak("fp8"), 2.0 * rows * columns * depth / moved * gpu.memory_gb_per_s * 1e9)
        return Product((rows, columns, depth, groups), tflops * 1e12 / limit)

    forward = tuple(product for product in hardware.products["inference"] if product.shape[0] >= 1024)
    products = {
        **hardware.products,
        "forward": forward,
        "input_gradient": forward,
        "weight_gradient": tuple(share(*measured) for measured in LATER_WEIGHT_GRADIENTS),
    }
    return replace(hardware, products=products)


def sweep(job: Job) -> list[dict]:
    """The fastest layout on each number of GPUs; where none fits, the fastest if memory had no limit."""
    steps = []
    for count in COUNTS:
        on_count = replace(job, count=count)
        plan = search(on_count)
        fits = plan is not None
        plan = plan or search(on_count, must_fit=False)
        assert plan is not None
        steps.append(
            {
                "gpus": count,
                "fits": fits,
                "step_s": plan.step.total,
                "bubble": plan.step.bubble / plan.step.total,
                "mfu": plan.mfu,
                "memory_gb": plan.memory.total / 1e9,
                "layout": describe(plan),
            }
        )
    return steps


def picture(steps: list[dict], as_trained: TrainingPlan) -> None:
    points = [(step["gpus"], step["step_s"]) for step in steps]
    ideal = [(count, as_trained.step.total * 2048 / count) for count in COUNTS]
    unfit = frozenset(step["gpus"] for step in steps if not step["fits"])
    chart = log_chart(
        "DeepSeek-V3, 15,360 sequences of 4,096 tokens a step, on H800 (predicted)",
        "GPUs",
        "seconds a step",
        COUNTS,
        [
            Line("fastest layout; rings: too little memory", points, "#0072B2", hollow=unfit),
            Line("as efficient as the report's layout on 2,048", ideal, "#999999", dashed=True),
        ],
    )
    (ROOT / "docs" / PICTURE).write_text(chart, encoding="utf-8")


def serving(hardware: Hardware, gpu: Gpu) -> list[dict]:
    """Units of DeepSeek's production, of the report and smaller ones, at production's mean length of the cache."""
    job = ServingJob(V3, hardware, gpu, 320, "fp8", 4096, 1786)
    rows = []
    for prefill, decode in ((16, 16), (32, 32), (32, 72), (32, 144), (32, 320)):
        plan = plan_serving(job, prefill, decode)
        assert plan is not None
        rows.append(
            {
                "prefill": {**asdict(plan.prefill), "per_node": 8 * plan.prefill.tokens_per_s_per_gpu},
                "decode": {**asdict(plan.decode), "per_node": 8 * plan.decode.tokens_per_s_per_gpu},
            }
        )
    return rows


def _plan_figures(plan: TrainingPlan) -> dict:
    return {
        "layout": asdict(plan.layout),
        "memory": {**asdict(plan.memory), "total": plan.memory.total},
        "step": {**asdict(plan.step), "total": plan.step.total},
        "chunk_times": asdict(plan.times),
        "all_to_all_s": plan.all_to_all_s,
        "tokens_per_s_per_gpu": plan.tokens_per_s / 2048,
        "mfu": plan.mfu,
    }


def _run_table(plans: dict[str, TrainingPlan], hours: dict[str, float], off: dict[str, float]) -> Table:
    names = {
        "as_trained": "predicted, the report's layout",
        "found": "predicted, the fastest layout",
        "later_kernels": "predicted, the report's layout, DeepGEMM's later kernels",
    }
    rows: list[list[str | int | float]] = [["published", "pp 16, ep 64, zero 1, dualpipe", "", "", "2,664,000", ""]]
    for name, plan in plans.items():
        layout, step = plan.layout, plan.step
        rows.append(
            [
                names[name],
                f"pp {layout.pp}, ep {layout.ep}, zero {layout.zero}, {layout.schedule}",
                f"{plan.memory.total / 1e9:.1f} GB",
                f"{step.total:.2f} s",
                f"{hours[name]:,.0f}",
                f"{off[name]:+.1%}",
            ]
        )
    return Table(["14.8T tokens on 2,048 H800", "layout", "memory a rank", "a step", "H800 hours", "off"], rows)


def _steps_table(steps: list[dict]) -> Table:
    rows = [
        [
            step["gpus"],
            f"{step['step_s']:.4g} s" if step["fits"] else f"({step['step_s']:.4g} s)",
            f"{step['mfu']:.1%}",
            f"{step['bubble']:.1%}",
            f"{step['memory_gb']:.1f} GB" if step["fits"] else f"{step['memory_gb']:.1f} GB: too much",
            step["layout"],
        ]
        for step in steps
    ]
    return Table(["GPUs", "a step", "MFU", "bubble", "memory a rank", "layout"], rows)


def _serving_table(served: list[dict]) -> Table:
    rows: list[list[str | int | float]] = []
    for row in served:
        prefill, decode = row["prefill"], row["decode"]
        rows.append(
            [
                f"{prefill['gpus']} GPUs, {prefill['per_node']:,.0f} tokens/s",
                f"{decode['gpus']} GPUs, {decode['per_node']:,.0f} tokens/s",
                decode["batch"],
                f"{decode['step_s'] * 1e3:.1f} ms",
                f"{decode['cache_bytes'] / 1e9:.1f} GB",
            ]
        )
    return Table(["prefill unit, per node", "decode unit, per node", "requests a GPU", "a step", "their cache"], rows)


def _said(*arguments: str) -> str:
    printed = io.StringIO()
    with redirect_stdout(printed):
        assert fireflyer(["plan", *arguments]) == 0
    return f"$ fireflyer plan {' '.join(arguments)}\n{printed.getvalue()}"
