"""The simulator's outcomes as one picture: where the node-seconds went, how long first slices were waited for, who got
how much of an even share, and how full the cluster was over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fireflyer.errors import UserError

# Okabe and Ito's colours, which colour-blind readers tell apart.
_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999")
_PARTS = ("useful", "starting", "saving", "lost", "reserved", "unfit", "nothing_waits")
_PART_NAMES = (
    "useful",
    "starting",
    "saving",
    "lost by faults",
    "freed for a gang",
    "too few together",
    "nothing waits",
)


def draw(
    path: Path,
    title: str,
    results: Mapping[str, dict[str, Any]],
    occupancy: Mapping[str, Sequence[tuple[float, int, int]]],
    num_nodes: int,
) -> None:
    """Write a picture of each policy's figures. The file's ending says how: .svg or .png. Raises UserError."""
    if path.suffix not in (".svg", ".png"):
        raise UserError(f"--plot {path}: its name has to end with .svg or .png")
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("pictures need matplotlib; install it with: pip install 'fireflyer[plot]'") from None
    colours = dict(zip(results, _COLOURS, strict=False))
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fireflyer", "font.size": 9}):
        figure = Figure(figsize=(10, 7.5), layout="constrained")
        axes = figure.subplots(2, 2)
        figure.suptitle(title)
        _node_seconds(axes[0][0], results)
        _waits(axes[0][1], results, colours)
        _shares(axes[1][0], results, colours)
        _over_time(axes[1][1], occupancy, colours, num_nodes)
        metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
        try:
            figure.savefig(path, dpi=110, metadata=metadata)
        except OSError as error:
            raise UserError(f"--plot {path}: {error.strerror or error}") from None


def _node_seconds(axes: Any, results: Mapping[str, dict[str, Any]]) -> None:
    left = [0.0] * len(results)
    for part, name, colour in zip(_PARTS, _PART_NAMES, _COLOURS, strict=True):
        widths = [100.0 * result["share"][part] for result in results.values()]
        axes.barh(list(results), widths, left=left, color=colour, label=name)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlim(50.0, 100.0)
    axes.set_xlabel("% of the node-seconds of nodes that were up (from 50)")
    axes.set_title("Where the time went")
    axes.legend(fontsize=7, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.16), frameon=False)


def _waits(axes: Any, results: Mapping[str, dict[str, Any]], colours: Mapping[str, str]) -> None:
    width = 0.8 / len(results)
    for place, (policy, result) in enumerate(results.items()):
        for at, spread in enumerate(result["wait_s"].values()):
            if spread["p50"] is not None:
                x = at + (place - (len(results) - 1) / 2) * width
                low, high = max(spread["p50"], 1.0), max(spread["p99"], 1.0)
                axes.plot([x, x], [low, high], color=colours[policy], linewidth=3, solid_capstyle="butt")
                axes.plot([x], [low], "o", color=colours[policy], markersize=5)
    axes.set_yscale("log")
    axes.set_yticks([1, 60, 3600, 86400, 30 * 86400], ["1 s", "1 min", "1 h", "1 day", "30 days"])
    axes.set_xticks(range(len(next(iter(results.values()))["wait_s"])), list(next(iter(results.values()))["wait_s"]))
    axes.set_xlabel("nodes that the task asks for")
    axes.set_title("Wait for the first slice: median (dot) to 99 of 100")
    _legend(axes, colours)


def _shares(axes: Any, results: Mapping[str, dict[str, Any]], colours: Mapping[str, str]) -> None:
    for policy, result in results.items():
        axes.plot(result["fairness"]["by_user"], color=colours[policy])
    axes.axhline(1.0, color="black", linewidth=0.6)
    axes.set_xlabel("users, from the worst served to the best")
    axes.set_title("What each user had, over an even share")
    _legend(axes, colours)


def _over_time(
    axes: Any, occupancy: Mapping[str, Sequence[tuple[float, int, int]]], colours: Mapping[str, str], num_nodes: int
) -> None:
    for policy, samples in occupancy.items():
        step = max(1, len(samples) // 120)
        used = [
            sum(n for _, n, _ in samples[i : i + step]) / len(samples[i : i + step])
            for i in range(0, len(samples), step)
        ]
        days = [samples[i][0] / 86_400.0 for i in range(0, len(samples), step)]
        axes.plot(days, [100.0 * nodes / num_nodes for nodes in used], color=colours[policy], linewidth=1)
    axes.set_xlabel("days")
    axes.set_title("% of the nodes that are held")
    _legend(axes, colours)


def _legend(axes: Any, colours: Mapping[str, str]) -> None:
    for policy, colour in colours.items():
        axes.plot([], [], color=colour, label=policy)
    axes.legend(fontsize=7, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.16), frameon=False)
