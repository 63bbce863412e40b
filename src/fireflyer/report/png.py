"""The report's charts as PNG files, through matplotlib. In: runs and a folder. Out: the paths written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fireflyer.checkpoint.run_folder import writing
from fireflyer.errors import UserError
from fireflyer.report.charts import Chart, HeatMap, charts, heat_maps
from fireflyer.report.run_data import RunData

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = ("#b86a00", "#1f6fb2")


def write_pngs(runs: Sequence[RunData], folder: Path) -> list[Path]:
    """One file a chart, and one for the experts of each run; earlier ones of the same names are replaced.

    Raises UserError without matplotlib, or where the folder can't be written to.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("--png needs matplotlib: pip install 'fireflyer[plot]'") from error
    written = []
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for chart in charts(runs):
            figure = Figure(figsize=(7, 4), layout="constrained")
            _draw(figure, chart)
            written.append(folder / f"{chart.key}.png")
            figure.savefig(written[-1], dpi=130)
        maps = heat_maps(runs)
        for number, run in enumerate(runs):
            layers = [heat_map for heat_map in maps if heat_map.run == number]
            if layers:
                figure = Figure(figsize=(7, 0.6 + 1.3 * len(layers)), layout="constrained")
                _draw_experts(figure, layers)
                written.append(folder / (f"experts-{run.name}.png" if len(runs) > 1 else "experts.png"))
                figure.savefig(written[-1], dpi=130)
    return written


def _draw(figure: Figure, chart: Chart) -> None:
    axes = figure.subplots()
    for line in chart.lines:
        axes.plot(
            line.tokens,
            line.values,
            color=_COLOURS[line.run],
            linestyle="--" if line.dashed else "-",
            linewidth=1.2,
            marker="o" if line.marks else None,
            markersize=3,
            label=line.name or None,
        )
    axes.set_title(chart.title)
    axes.set_xlabel("tokens")
    axes.set_ylabel(chart.unit)
    if chart.log:
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    if len(chart.lines) > 1:
        axes.legend(frameon=False)


def _draw_experts(figure: Figure, layers: Sequence[HeatMap]) -> None:
    """Time to the right, an expert a row; 1 is an even share."""
    rows = figure.subplots(len(layers), 1, squeeze=False, sharex=True)[:, 0]
    image = None
    for axes, heat_map in zip(rows, layers, strict=True):
        columns = list(zip(*heat_map.load, strict=True))  # (experts, moments)
        span = (heat_map.steps[0], heat_map.steps[-1], len(columns) - 0.5, -0.5)
        image = axes.imshow(
            columns, aspect="auto", vmin=0, vmax=3, cmap="inferno", extent=span, interpolation="nearest"
        )
        axes.set_ylabel(f"layer {heat_map.layer}")
    rows[-1].set_xlabel("step")
    if image is not None:
        figure.colorbar(image, ax=list(rows), label="load over an even share")
