"""SVG figure of an ablation's results: one panel per world, on one scale."""

from __future__ import annotations

from html import escape
from statistics import fmean

from iris_fast.tiny.recipe.ablation_page import (
    LABELS,
    Results,
    World,
    arm_alignments,
    changes,
    has_results,
    textured_parts,
)

OFF_SCALE = "direct"  # ignored for the axis: its values may be far from all others
WIDTH, LEFT, RIGHT = 460, 160, 400  # of the figure; ends of the axis
LINE, HEAD, FOOT = 17, 34, 46
TICK = 0.1


def figure(results: Results) -> str:
    """Change of accuracy of all runs: dots are seeds, bars their mean, right the alignment of the
    arm's reward with the verifier before training."""
    worlds = {name: world for name, world in results["worlds"].items() if has_results(world)}
    low, high = _scale(worlds)
    panels, top = [], 0
    for name, world in worlds.items():
        panels.append(f"<g transform='translate(0,{top})'>{_panel(name, world, low, high)}</g>")
        top += HEAD + LINE * len(world["arms"])
    panels.append(f"<g transform='translate(0,{top})'>{_axis(low, high)}</g>")
    height = top + FOOT
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {height}' width='{WIDTH}' "
        "font-family='system-ui, sans-serif' font-size='12' fill='#222'>"
        f"<rect width='{WIDTH}' height='{height}' fill='#fff'/>{''.join(panels)}</svg>\n"
    )


def _scale(worlds: dict[str, World]) -> tuple[float, float]:
    """Ends of the axis, multiples of TICK around 0."""
    shown = [
        value
        for world in worlds.values()
        for name, arm in world["arms"].items()
        for value in changes(arm)
        if name != OFF_SCALE
    ]
    low, high = min(shown, default=0.0), max(shown, default=0.0)
    return -TICK * max(1, -(low // TICK)), TICK * max(1, -(-high // TICK))


def _x_of(value: float, low: float, high: float) -> float:
    share = min(max((value - low) / (high - low), 0.0), 1.0)
    return round(LEFT + (RIGHT - LEFT) * share, 1)


def _panel(title: str, world: World, low: float, high: float) -> str:
    zero, bottom = _x_of(0.0, low, high), HEAD + LINE * len(world["arms"])
    omission = world["settings"]["omission"]
    described = f"textured {textured_parts(world)}, {omission:.0%} of things missing"
    parts = [
        f"<text x='8' y='24'><tspan font-weight='bold'>{escape(title)}</tspan>: {described}</text>",
        f"<text x='{WIDTH - 8}' y='24' text-anchor='end' fill='#666'>alignment</text>",
        f"<line x1='{zero}' x2='{zero}' y1='{HEAD - 4}' y2='{bottom}' stroke='#777' "
        "stroke-dasharray='3 2'/>",
    ]
    for line, (name, arm) in enumerate(world["arms"].items()):
        y = HEAD + LINE * line + LINE // 2
        found = arm_alignments(world, name)
        alignment = f"{fmean(a.value for a in found):+.2f}" if found else ""
        parts += [
            f"<text x='{LEFT - 10}' y='{y + 4}' text-anchor='end'>"
            f"{escape(LABELS.get(name, name))}</text>",
            f"<line x1='{LEFT}' x2='{RIGHT}' y1='{y}' y2='{y}' stroke='#ddd'/>",
            f"<text x='{WIDTH - 8}' y='{y + 4}' text-anchor='end'>{alignment}</text>",
            _dots(changes(arm), y, low, high),
        ]
    return "".join(parts)


def _dots(values: list[float], y: int, low: float, high: float) -> str:
    parts = [
        f"<circle cx='{_x_of(value, low, high)}' cy='{y}' r='3.5' fill='#b45309' opacity='.6'/>"
        for value in values
    ]
    if values:
        mean = fmean(values)
        x = _x_of(mean, low, high)
        parts.append(
            f"<line x1='{x}' x2='{x}' y1='{y - 6}' y2='{y + 6}' stroke='#1d4ed8' "
            "stroke-width='2.5'/>"
        )
        if not low <= mean <= high:
            x, anchor = (LEFT + 8, "start") if mean < low else (RIGHT - 8, "end")
            parts.append(
                f"<text x='{x}' y='{y + 4}' text-anchor='{anchor}'>{mean:+.2f}, off scale</text>"
            )
    return "".join(parts)


def _axis(low: float, high: float) -> str:
    ticks = [TICK * number for number in range(round(low / TICK), round(high / TICK) + 1)]
    every = -(-len(ticks) // 6)
    labels = "".join(
        f"<text x='{_x_of(tick, low, high)}' y='16' text-anchor='middle'>"
        f"{f'{tick:+.1f}' if round(tick / TICK) else '0'}</text>"
        for tick in ticks
        if round(tick / TICK) % every == 0
    )
    middle = (LEFT + RIGHT) // 2
    return (
        f"{labels}<text x='{middle}' y='36' text-anchor='middle'>change of accuracy by training"
        "</text>"
    )
