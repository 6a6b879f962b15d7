"""The small world: coloured shapes on quiet backgrounds, described by a record and drawn from it.

A `Scene` is a background and a list of `Thing`s; `render` is a pure function of it. What people
would call the content (shape, colour, place, number) is what captions speak of; what they would
call the finish (background pattern, shading, exact size and place) no caption mentions, so that a
model trained on this world can make simple, uniform pictures or rich ones of the same prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

SIDE = 64
Pixels = NDArray[np.uint8]
Field = NDArray[np.float32]

SHAPES = ("circle", "square", "triangle", "cross", "ring")
# Hues at least 43 degrees apart, so that a blurred picture still has the colour it had.
COLOURS = {
    "red": (220, 40, 40),
    "yellow": (240, 210, 40),
    "green": (40, 170, 70),
    "cyan": (40, 195, 210),
    "blue": (40, 80, 215),
    "purple": (165, 55, 205),
}
# Nearly without colour: whatever is colourful in a picture is a thing.
TONES = (
    (236, 234, 228),
    (204, 208, 214),
    (168, 164, 158),
    (120, 122, 128),
    (70, 70, 76),
    (34, 34, 42),
)
BACKGROUNDS = ("plain", "gradient", "stripes", "checks")
SHADINGS = ("flat", "shaded", "glossy", "banded")
KINDS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
RELATIONS = ("left of", "right of", "above", "below")

# Centres and radii come from a coarse grid: few codes then draw every edge there is.
GRID = 4
SMALL, MEDIUM, LARGE = 9, 12, 17
GAP = 4

_AXIS = np.arange(SIDE, dtype=np.float32) + 0.5
_X, _Y = np.meshgrid(_AXIS, _AXIS)


@dataclass(frozen=True)
class Thing:
    """One shape. `x`, `y`: its centre in pixels from the top left; `radius`: half its width."""

    shape: str
    colour: str
    radius: int
    x: int
    y: int
    shading: str


@dataclass(frozen=True)
class Scene:
    """What a picture shows. `tones`: the two greys of the background pattern."""

    kind: str
    background: str
    tones: tuple[int, int]
    things: tuple[Thing, ...]


def shape_distance(shape: str, dx: Field, dy: Field, radius: float) -> Field:
    """Signed distance-like field of a shape around 0: negative inside, about 1 per pixel.

    Its width is 2 * radius for every shape, so a bounding box alone does not tell the shape.
    """
    ax, ay = np.abs(dx), np.abs(dy)
    if shape == "circle":
        return np.hypot(dx, dy) - radius
    if shape == "square":
        return np.maximum(ax, ay) - radius
    if shape == "cross":
        bar = radius / 3
        return np.minimum(np.maximum(ax - radius, ay - bar), np.maximum(ax - bar, ay - radius))
    if shape == "ring":
        return np.abs(np.hypot(dx, dy) - 0.72 * radius) - 0.28 * radius
    if shape == "triangle":  # apex up, as high as it is wide
        slope = (2 * ax - dy - radius) / np.float32(5**0.5)
        return np.maximum(slope, dy - radius)
    raise ValueError(f"no shape {shape!r}: choose one of {', '.join(SHAPES)}")


def render(scene: Scene) -> Pixels:
    """The picture [64, 64, 3] of a scene; edges cover their pixels in part (anti-aliased)."""
    canvas = _background(scene.background, *scene.tones)
    for thing in scene.things:
        dx, dy = _X - thing.x, _Y - thing.y
        cover = np.clip(0.5 - shape_distance(thing.shape, dx, dy, thing.radius), 0, 1)[..., None]
        canvas += cover * (_paint(thing, dx, dy) - canvas)
    return np.clip(canvas + 0.5, 0, 255).astype(np.uint8)


def render_all(scenes: list[Scene]) -> Pixels:
    """Pictures [N, 64, 64, 3]."""
    return np.stack([render(scene) for scene in scenes])


def _background(pattern: str, first: int, second: int) -> Field:
    a, b = (np.array(TONES[tone], dtype=np.float32) for tone in (first, second))
    if pattern == "plain":
        mix = np.zeros_like(_X)
    elif pattern == "gradient":
        mix = _Y / SIDE
    elif pattern == "stripes":
        mix = (_X // 8) % 2
    else:
        mix = (_X // 16 + _Y // 16) % 2
    return a + mix[..., None] * (b - a)


def _paint(thing: Thing, dx: Field, dy: Field) -> Field:
    """The colour of a thing at every pixel; shading changes brightness, hardly the hue."""
    colour = np.array(COLOURS[thing.colour], dtype=np.float32)
    if thing.shading == "shaded":
        return colour * (0.95 - 0.3 * np.clip(dy / thing.radius, -1, 1))[..., None]
    if thing.shading == "banded":
        return colour * np.where((_Y // 4) % 2 == 0, 1.0, 0.7)[..., None]
    if thing.shading == "glossy":
        reach = (dx + 0.35 * thing.radius) ** 2 + (dy + 0.35 * thing.radius) ** 2
        light = 0.55 * np.exp(-reach / (0.3 * thing.radius) ** 2)[..., None]
        return colour + light * (255 - colour)
    return np.broadcast_to(colour, (SIDE, SIDE, 3))


def random_scene(kind: str, rng: Generator) -> Scene:
    """A scene of which a caption of this GenEval kind can be true."""
    first, second = rng.permutation(len(TONES))[:2]
    background = str(rng.choice(BACKGROUNDS))
    return Scene(kind, background, (int(first), int(second)), tuple(_things(kind, rng)))


def random_scenes(count: int, seed: int) -> list[Scene]:
    """`count` scenes, the kinds in turn; the same for the same seed."""
    rng = np.random.default_rng(seed)
    return [random_scene(KINDS[i % len(KINDS)], rng) for i in range(count)]


def _things(kind: str, rng: Generator) -> list[Thing]:
    shapes = [str(name) for name in rng.permutation(SHAPES)]
    colours = [str(name) for name in rng.permutation(list(COLOURS))]
    shading = str(rng.choice(SHADINGS))
    if kind in ("single_object", "colors"):
        radius = int(rng.choice((MEDIUM, LARGE)))
        spots = [tuple(_snap(rng.uniform(radius + 1, SIDE - radius - 1, 2)))]
        radii = [radius]
    elif kind == "counting":
        number = int(rng.integers(2, 5))
        radii = [SMALL if number > 2 else int(rng.choice((SMALL, MEDIUM)))] * number
        spots = _corners(number, 2 * radii[0] + GAP, rng)
        shapes, colours = shapes[:1] * number, colours[:1] * number
    else:
        radii = [int(rng.choice((SMALL, MEDIUM))) for _ in range(2)]
        spots = _pair(radii, rng)
    return [
        Thing(shapes[i], colours[i], radii[i], int(spot[0]), int(spot[1]), shading)
        for i, spot in enumerate(spots)
    ]


def _pair(radii: list[int], rng: Generator) -> list[NDArray[np.int64]]:
    """Two centres, clearly beside or clearly above each other."""
    low, high = max(radii) + 2, SIDE - max(radii) - 2
    while True:
        spots = [_snap(rng.uniform(low, high, 2)) for _ in range(2)]
        near, far = sorted(np.abs(spots[0] - spots[1]))
        if far >= sum(radii) + GAP and near <= 2 * GRID:
            return spots


def _corners(number: int, apart: int, rng: Generator) -> list[NDArray[np.int64]]:
    """Centres near different corners of a square, `apart` or more from each other on an axis."""
    while True:
        corners = rng.permutation(4)[:number]
        centres = np.stack([16 + 32 * (corners % 2), 16 + 32 * (corners // 2)], axis=1)
        spots = [_snap(centre + rng.uniform(-6, 6, 2)) for centre in centres]
        if all(np.abs(a - b).max() >= apart for a, b in combinations(spots, 2)):
            return spots


def _snap(point: NDArray[np.float64]) -> NDArray[np.int64]:
    return (np.round(np.asarray(point) / GRID) * GRID).astype(np.int64)
