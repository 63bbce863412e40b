"""`fireflyer plan CONFIG`: the fastest layout that fits on a cluster, what training or serving costs. No torch."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from fireflyer.cli import placement
from fireflyer.cli.configs import find_model, find_recipe
from fireflyer.errors import UserError

if TYPE_CHECKING:
    from fireflyer.config import ModelConfig
    from fireflyer.cost.hardware import Gpu, Hardware
    from fireflyer.cost.judge import TrainingPlan
    from fireflyer.cost.serving_plan import ServingPlan


def add_parser(subparsers: Any) -> None:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "plan",
        help="the layout that fits and is fastest on a cluster; time and money of training and serving",
        description="The layout that fits and is fastest on a cluster, and what training costs there; with --serve the"
        " units that serve a model. From cited rates of hardware; nothing is measured and no GPU is needed.",
    )
    parser.add_argument(
        "config",
        metavar="CONFIG",
        nargs="?",
        help="a checkpoint or run folder, a config.json, a recipe, or a shipped model such as deepseek-v3",
    )
    parser.add_argument("--gpu", default="H800", metavar="NAME", help="the card (default H800)")
    parser.add_argument("--count", type=_count, metavar="N", help="how many (default 2048, or as many as sequences)")
    parser.add_argument("--hardware", metavar="FILE", help="TOML that adds cards or changes their numbers")
    parser.add_argument("--sources", action="store_true", help="show the cards and where each number comes from")
    parser.add_argument("--usd-per-hour", type=_number, metavar="X", help="rent of one card (default the table's)")
    parser.add_argument("--precision", choices=("fp8", "bf16"), help="of the products (default fp8 where the card can)")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    _add_training(parser)
    _add_layout(parser)
    _add_serving(parser)
    placement.add_arguments(parser)


def _add_training(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training")
    group.add_argument("--tokens", type=_quantity, metavar="N", help="as 14.8T (default the recipe's, or V3's)")
    group.add_argument("--seq-len", type=_count, metavar="N", help="tokens a sequence (default likewise, 4096)")
    group.add_argument("--global-batch", type=_count, metavar="N", help="sequences a step (default likewise, 15360)")
    group.add_argument(
        "--hours-per-trillion",
        type=_above_zero,
        metavar="H",
        help="device hours per trillion tokens, where you know them",
    )
    group.add_argument("--context-hours", type=_number, metavar="H", help="of context extension (default as V3's)")
    group.add_argument("--post-hours", type=_number, metavar="H", help="of post-training (default as V3's)")


def _add_layout(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("layout", "fixed by hand; what isn't given is searched")
    for name, what in (
        ("pp", "pipeline ranks"),
        ("dp", "data ranks"),
        ("cp", "context ranks"),
        ("ep", "expert ranks, out of dp x cp"),
        ("micro-batch", "sequences"),
    ):
        group.add_argument(f"--{name}", type=_count, metavar="N", help=what)
    group.add_argument("--zero", type=int, choices=(1, 2, 3), help="what is sharded over data ranks")
    group.add_argument("--recompute", choices=("none", "selective", "full"), help="of activations; V3's is selective")
    group.add_argument("--schedule", choices=("1f1b", "interleaved", "zero-bubble", "dualpipe", "dualpipev"))


def _add_serving(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("serving")
    group.add_argument("--serve", action="store_true", help="plan serving instead of training")
    group.add_argument("--prompt", type=_count, default=4096, metavar="N", help="tokens in (default 4096)")
    group.add_argument("--output", type=_count, default=1024, metavar="N", help="tokens out (default 1024)")
    group.add_argument(
        "--cache-hits", type=_share, default=0.0, metavar="P", help="share of the prompt cached (default 0)"
    )
    group.add_argument(
        "--mtp-acceptance", type=_share, default=0.0, metavar="P", help="of MTP drafts (default 0: none)"
    )
    group.add_argument(
        "--user-speed", type=_above_zero, default=20.0, metavar="N", help="least tokens/s of each user (default 20)"
    )
    group.add_argument("--prefill-unit", type=_count, metavar="N", help="GPUs of a prefill unit (default searched)")
    group.add_argument("--decode-unit", type=_count, metavar="N", help="GPUs of a decode unit (default searched)")


def _count(text: str) -> int:
    value = text.replace(",", "")
    if not value.isdigit() or int(value) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} isn't a whole number of 1 or more")
    return int(value)


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} isn't a number of 0 or more")
    return value


def _above_zero(text: str) -> float:
    value = _number(text)
    if not value:
        raise argparse.ArgumentTypeError(f"{text!r} isn't a number above 0")
    return value


def _share(text: str) -> float:
    value = _number(text)
    if value >= 1:
        raise argparse.ArgumentTypeError(f"{text!r} isn't a share: give 0 to below 1, as 0.85")
    return value


def _quantity(text: str) -> int:
    from fireflyer.train.quantities import parse_quantity

    try:
        tokens = parse_quantity(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} {error}") from None
    if not tokens:
        raise argparse.ArgumentTypeError(f"{text!r} is no tokens; give a number such as 14.8T")
    return tokens


def run(args: argparse.Namespace) -> int:
    from fireflyer.cost.hardware import load_hardware

    hardware = load_hardware(args.hardware)
    if args.sources:
        print(json.dumps({"date": hardware.date, "sources": hardware.sources}) if args.json else sources(hardware))
        return 0
    if args.config is None:
        raise UserError("no CONFIG given; name a model, as `fireflyer plan deepseek-v3`, or give --sources")
    gpu = hardware.gpu(args.gpu)
    config = find_model(args.config)
    if args.placement is not None:
        return placement.place(args, config)
    args.precision = args.precision or ("fp8" if gpu.fp8_tflops else "bf16")
    gpu.peak(args.precision)
    rent = gpu.usd_per_hour if args.usd_per_hour is None else args.usd_per_hour
    make = serving if args.serve else training
    facts, text = make(args, config, hardware, gpu, rent)
    print(json.dumps(facts) if args.json else text)
    return 0


def training(
    args: argparse.Namespace, config: ModelConfig, hardware: Hardware, gpu: Gpu, rent: float | None
) -> tuple[dict[str, Any], str]:
    """The plan of training, as JSON and as text."""
    from fireflyer.cost import v3_run
    from fireflyer.cost.layout_checks import fastest
    from fireflyer.cost.layouts import Job, Wanted
    from fireflyer.cost.training_cost import training_cost

    recipe = find_recipe(args.config)
    seq_len, batch, tokens = min(4096, config.max_position_embeddings), 15360, int(v3_run.PRETRAINING_TOKENS)
    if recipe is not None:
        seq_len, batch, tokens = recipe.seq_len, recipe.batch_size, recipe.total_tokens or tokens
    most = 1 << (batch.bit_length() - 1)  # the largest power of two that gives each card a sequence
    count = args.count or min(2048, most)
    job = Job(config, hardware, gpu, count, args.seq_len or seq_len, args.global_batch or batch, args.precision)
    names = ("pp", "dp", "cp", "ep", "zero", "micro_batch", "recompute", "schedule")
    plan = fastest(job, Wanted(*(getattr(args, name) for name in names)), args.config)
    cost = training_cost(
        job,
        plan,
        tokens=args.tokens or tokens,
        usd_per_hour=rent,
        hours_per_trillion=args.hours_per_trillion,
        context_hours=args.context_hours,
        post_hours=args.post_hours,
    )
    facts = {
        "model": args.config,
        "gpu": {"name": gpu.name, "count": count, "usd_per_hour": rent, "table_date": hardware.date},
        "layout": asdict(plan.layout),
        "memory_per_rank_bytes": round(plan.memory.total),
        "memory": {name: round(value) for name, value in asdict(plan.memory).items()},
        "train": cost.train,
        "total": cost.total,
    }
    return facts, training_text(args, gpu, plan, facts)


def training_text(args: argparse.Namespace, gpu: Gpu, plan: TrainingPlan, facts: dict[str, Any]) -> str:
    """The same for people."""
    from fireflyer.cost.layout_checks import describe
    from fireflyer.cost.layouts import RESERVED
    from fireflyer.train.quantities import format_quantity

    train, total, memory, step = facts["train"], facts["total"], facts["memory"], plan.step
    usable = gpu.memory_gb * (1 - RESERVED)
    parts = ", ".join(f"{name} {_bytes(value)}" for name, value in memory.items())
    spent = "given" if args.hours_per_trillion is not None else "predicted"
    tokens = train["global_batch"] * train["seq_len"]
    rows = [
        ("layout", describe(plan)),
        ("memory a rank", f"{_bytes(plan.memory.total)} of {gpu.memory_gb:g} GB, {usable:.1f} usable"),
        ("", parts),
        ("a step", f"{step.total:.4g} s for {tokens:,} tokens"),
        ("  computing", f"{step.chunks:.4g} s with the communication that isn't hidden"),
        ("  bubble", f"{step.bubble:.4g} s, {step.bubble / step.total:.1%}"),
        ("  gradients", f"{step.gradients:.4g} s to add them up, {step.optimizer:.2g} s for the optimizer"),
        ("  all-to-all", f"{plan.all_to_all_s:.4g} s, hidden or in the above"),
        ("a token", f"{train['gflop_per_token']:.4g} GFLOP, {train['mtp_gflop_per_token']:.4g} more for MTP"),
        ("speed", f"{train['tokens_per_s']:,.0f} tokens/s, MFU {train['mfu']:.1%} of the BF16 peak"),
        ("pretraining", f"{format_quantity(train['tokens'])} tokens in {_time(train['days'])}, {spent}"),
        ("", _money(train)),
        ("in total", f"{_money(total)}, with context extension and post-training as V3's"),
    ]
    head = f"{args.config} on {facts['gpu']['count']:,} {gpu.name} in {train['precision'].upper()}"
    if facts["gpu"]["usd_per_hour"] is None:
        rows.append(("", f"the table has no rent of {gpu.name}; give --usd-per-hour"))
    return "\n".join([head, "", *(f"{name:<16}{what}".rstrip() for name, what in rows)])


def _money(cost: dict[str, Any]) -> str:
    hours = f"{_figures(cost['device_hours'])} device hours"
    return hours if cost["usd"] is None else f"{hours}, ${_figures(cost['usd'])}"


def _figures(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}"


def _bytes(value: float) -> str:
    return f"{value / 1e9:.1f} GB" if value >= 1e9 else f"{value / 1e6:.1f} MB"


def _time(days: float) -> str:
    for unit, size in (("days", 1.0), ("hours", 1 / 24), ("minutes", 1 / 1440)):
        if days >= size:
            return f"{days / size:.1f} {unit}"
    return f"{days * 86400:.2g} seconds"


def serving(
    args: argparse.Namespace, config: ModelConfig, hardware: Hardware, gpu: Gpu, rent: float | None
) -> tuple[dict[str, Any], str]:
    """The plan of serving, as JSON and as text."""
    from fireflyer.cost.serving_plan import ServingJob, plan_serving, unit_complaint

    job = ServingJob(
        config=config,
        hardware=hardware,
        gpu=gpu,
        count=args.count or 352,
        precision=args.precision,
        prompt=args.prompt,
        output=args.output,
        cache_hits=args.cache_hits,
        mtp_acceptance=args.mtp_acceptance if config.num_nextn_predict_layers else 0.0,
        least_tokens_per_s=args.user_speed,
    )
    if args.mtp_acceptance and not config.num_nextn_predict_layers:
        raise UserError(f"--mtp-acceptance {args.mtp_acceptance:g}: {args.config} has no MTP module; leave it out")
    for option, gpus in (("--prefill-unit", args.prefill_unit), ("--decode-unit", args.decode_unit)):
        if gpus is not None and gpus > job.count:
            raise UserError(f"{option} {gpus} is more than --count {job.count}; give --count {gpus} or more")
    plan = plan_serving(job, args.prefill_unit, args.decode_unit)
    if plan is None:
        raise UserError(unit_complaint(job, args.prefill_unit, args.decode_unit, args.config))
    facts = {
        "model": args.config,
        "gpu": {"name": gpu.name, "count": job.count, "usd_per_hour": rent, "table_date": hardware.date},
        "precision": args.precision,
        "serve": _serve_facts(job, plan, rent),
    }
    return facts, serving_text(args, gpu, plan, facts)


def _serve_facts(job: Any, plan: ServingPlan, rent: float | None) -> dict[str, Any]:
    node = job.gpu.gpus_per_node
    prefill, decode = (unit.tokens_per_s_per_gpu for unit in (plan.prefill, plan.decode))

    def usd_per_million(gpu_seconds: float) -> float | None:
        return None if rent is None else gpu_seconds * 1e6 * rent / 3600

    request = job.prompt / prefill + job.output / decode
    return {
        "prefill_tokens_per_s_per_node": prefill * node,
        "decode_tokens_per_s_per_node": decode * node,
        "batch": plan.decode.batch,
        "cache_bytes": round(plan.decode.cache_bytes),
        "usd_per_million_tokens": usd_per_million(request / (job.prompt + job.output)),
        "usd_per_million_input_tokens": usd_per_million(1 / prefill),
        "usd_per_million_output_tokens": usd_per_million(1 / decode),
        "tokens_per_s_per_user": (1 + job.mtp_acceptance) / plan.decode.step_s,
        "prompt": job.prompt,
        "output": job.output,
        "prefill": asdict(plan.prefill),
        "decode": asdict(plan.decode),
    }


def serving_text(args: argparse.Namespace, gpu: Gpu, plan: ServingPlan, facts: dict[str, Any]) -> str:
    """The same for people."""
    serve, prefill, decode = facts["serve"], plan.prefill, plan.decode
    speeds = [f"{serve[f'{kind}_tokens_per_s_per_node']:,.0f} tokens/s per node" for kind in ("prefill", "decode")]
    read = f"{prefill.batch:,} tokens a GPU in {prefill.step_s:.3g} s"
    written = f"{decode.batch} requests a GPU in {decode.step_s * 1e3:.3g} ms"
    cache = f"cache {decode.cache_bytes / 1e9:.1f} GB of {gpu.memory_gb:g}"
    rows = [
        ("prefill unit", f"{prefill.gpus} GPUs, {_held(prefill)}; {read}"),
        ("", f"{speeds[0]} of {gpu.gpus_per_node}"),
        ("decode unit", f"{decode.gpus} GPUs, {_held(decode)}; {written}"),
        ("", f"{speeds[1]}, {serve['tokens_per_s_per_user']:.1f} per user"),
        ("memory", f"weights {decode.weights_bytes / 1e9:.1f} GB, {cache}"),
    ]
    if serve["usd_per_million_tokens"] is None:
        rows.append(("cost", f"the table has no rent of {gpu.name}; give --usd-per-hour"))
    else:
        into, out, mixed = (serve[f"usd_per_million_{key}tokens"] for key in ("input_", "output_", ""))
        rows.append(("a million tokens", f"in ${into:.3f}, out ${out:.3f}, mixed ${mixed:.3f}"))
    lengths = f"{args.prompt:,} tokens in and {args.output:,} out"
    head = f"{args.config} served on {gpu.name} in {args.precision.upper()}, {lengths}"
    return "\n".join([head, "", *(f"{name:<18}{what}" for name, what in rows)])


def _held(unit: Any) -> str:
    if not unit.experts_per_gpu:
        return "no routed experts"
    return f"{unit.experts_per_gpu} expert{'s' if unit.experts_per_gpu > 1 else ''} of a layer each"


def sources(hardware: Hardware) -> str:
    """The table with the words beside every number."""
    lines = [f"looked up on {hardware.date}"]
    for gpu in hardware.gpus.values():
        lines += ["", gpu.name]
        for key, value in asdict(gpu).items():
            if key != "name" and value is not None:
                lines.append(f"  {key:<20}{value:>10g}  {hardware.sources[f'gpu.{gpu.name}.{key}']}")
    others = [(key, said) for key, said in hardware.sources.items() if not key.startswith("gpu.")]
    lines += ["", *(f"{key:<38}{said}" for key, said in others)]
    return "\n".join(lines)
