"""The plots of a run: fraction of the floor over V, time over rows, and images per second over the
number of sequences decoded together."""

from collections import defaultdict
from pathlib import Path
from typing import Any

from bench.harness.results import Run
from bench.harness.rows import Row

OURS = "#0b6e4f"
FLOOR = "the floor's"  # images per second that memory bandwidth allows
COLOURS = {
    FLOOR: "#444444",
    "eager": "#9a9a9a",
    "torch.compile": "#d1495b",
    "trl": "#edae49",
    "liger": "#30638e",
}


def draw(stem: str, run: Run, folder: Path) -> list[str]:
    """Write the plots that the run's rows allow; return their file names."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update(
        {"svg.hashsalt": "bench", "font.size": 9, "axes.spines.top": False,
         "axes.spines.right": False, "axes.grid": True, "grid.alpha": 0.3}
    )  # fmt: skip
    rows = [row for row in run["rows"] if row["value"] and row["floor"]]
    folder.mkdir(parents=True, exist_ok=True)
    names = []
    images = [row for row in rows if row["metric"] == "images"]
    times = [row for row in rows if row["metric"] != "images"]
    for name, figure in (
        (f"{stem}-floor.svg", _over(times, "V", "fraction of floor", of_floor=True)),
        (f"{stem}-time.svg", _over(times, "R", "time")),
        (f"{stem}-images.svg", _over(images, "sequences", "images")),
    ):
        if figure is not None:
            figure.savefig(folder / name, metadata={"Date": None}, bbox_inches="tight")
            names.append(name)
    return names


def _over(rows: list[Row], axis: str, label: str, of_floor: bool = False) -> Any:
    """A figure with one panel per case, metric and rest of the shape; None without panels.

    Only where `axis` takes several values. `of_floor` plots floor / time instead of the value.
    """
    from matplotlib.figure import Figure

    panels: dict[tuple, list[Row]] = defaultdict(list)
    for row in rows:
        if axis in row["shape"]:
            rest = tuple((k, v) for k, v in row["shape"].items() if k != axis)
            panels[row["case"], row["metric"], row["dtype"], rest].append(row)
    panels = {key: each for key, each in panels.items() if len(each) > 1}
    if not panels:
        return None
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(3.4 * columns, 2.8 * lines), layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for panel, ((case, metric, _, rest), each) in zip(axes, panels.items(), strict=False):
        _panel(panel, sorted(each, key=lambda row: row["shape"][axis]), axis, of_floor)
        title = [f"{case} {metric}", " ".join(f"{k}={v}" for k, v in rest)]
        panel.set_title("\n".join(title), fontsize=8)
        unit = f", {each[0]['unit']}" if not of_floor else ""
        panel.set_ylabel(label + unit)
    for panel in axes[len(panels) :]:
        panel.set_visible(False)
    legend = {line.get_label(): line for each in figure.axes for line in each.get_lines()}
    figure.legend(
        legend.values(),
        legend.keys(),
        loc="outside lower center",
        ncols=min(len(legend), 2 * columns),
    )
    return figure


def _panel(panel: Any, rows: list[Row], axis: str, of_floor: bool) -> None:
    series: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for row in rows:
        values = [("ours", row["value"]), *_peer_values(row)]
        if row["metric"] == "images":
            values.append((FLOOR, row["floor"]))
        for name, value in values:
            y = row["floor"] / value if of_floor else value
            series[name].append((row["shape"][axis], y))
    for name, points in series.items():
        ours = name == "ours"
        panel.plot(
            *zip(*points, strict=True), marker="o", markersize=4, label=name,
            color=OURS if ours else COLOURS.get(name), linewidth=2.2 if ours else 1.2,
            zorder=3 if ours else 2, linestyle="--" if name == FLOOR else "-",
        )  # fmt: skip
    panel.set_xscale("log", base=2)
    ticks = sorted({row["shape"][axis] for row in rows})
    panel.set_xticks(ticks, [thousands(tick) for tick in ticks])
    panel.set_xlabel(axis)
    if of_floor:
        panel.set_ylim(0, 1.05)
    else:
        panel.set_yscale("log")
        panel.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    panel.minorticks_off()


def thousands(number: int) -> str:
    """152k for 151936."""
    return str(number) if number < 10000 else f"{number / 1000:.0f}k"


def _peer_values(row: Row) -> list[tuple[str, float]]:
    return [(name, peer["value"]) for name, peer in row["peers"].items() if peer["value"]]
