"""The synthetic world: coloured shapes on nearly grey backgrounds, as records and as images.

A `Scene` is a background and a list of `SceneObject`s; `render` is a pure function of it. Captions
describe the content (shape, colour, position, number) and never the style (background pattern,
shading, exact size and position), so that a model trained on this world can generate simple,
uniform images or rich ones for the same prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

IMAGE_SIZE = 64
Pixels = NDArray[np.uint8]
Field = NDArray[np.float32]

SHAPES = ("circle", "square", "triangle", "cross", "ring")
# Hues at least 43 degrees apart, so that blurring an image does not change the nearest colour.
COLOURS = {
    "red": (220, 40, 40),
    "yellow": (240, 210, 40),
    "green": (40, 170, 70),
    "cyan": (40, 195, 210),
    "blue": (40, 80, 215),
    "purple": (165, 55, 205),
}
# Nearly grey, so that every saturated region of an image belongs to an object.
GREYS = (
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

# In pixels. Centres and radii come from a coarse grid, so that few VQ codes cover all edges.
GRID = 4
SMALL, MEDIUM, LARGE = 9, 12, 17  # radii
MIN_GAP = 4  # between two objects

_AXIS = np.arange(IMAGE_SIZE, dtype=np.float32) + 0.5
_X, _Y = np.meshgrid(_AXIS, _AXIS)


@dataclass(frozen=True)
class SceneObject:
    """One shape. `x`, `y`: centre in pixels from the top left; `radius`: half the width."""

    shape: str
    colour: str
    radius: int
    x: int
    y: int
    shading: str


@dataclass(frozen=True)
class Scene:
    """The content of an image. `greys`: indices into GREYS of the two background colours."""

    kind: str
    background: str
    greys: tuple[int, int]
    objects: tuple[SceneObject, ...]


def shape_distance(shape: str, dx: Field, dy: Field, radius: float) -> Field:
    """Approximate signed distance in pixels to a shape centred at 0, negative inside.

    Every shape is 2 * radius wide, so the size of its bounding box does not reveal the shape.
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
    raise ValueError(f"shape: {shape!r} is unknown; choose one of {', '.join(SHAPES)}")


def render(scene: Scene) -> Pixels:
    """Render a scene as an anti-aliased image, uint8 [64, 64, 3]."""
    canvas = _background(scene.background, *scene.greys)
    for obj in scene.objects:
        dx, dy = _X - obj.x, _Y - obj.y
        coverage = np.clip(0.5 - shape_distance(obj.shape, dx, dy, obj.radius), 0, 1)[..., None]
        canvas += coverage * (_object_colour(obj, dx, dy) - canvas)
    return np.clip(canvas + 0.5, 0, 255).astype(np.uint8)


def render_all(scenes: list[Scene]) -> Pixels:
    """Render scenes as images, uint8 [N, 64, 64, 3]."""
    return np.stack([render(scene) for scene in scenes])


def _background(pattern: str, first: int, second: int) -> Field:
    a, b = (np.array(GREYS[grey], dtype=np.float32) for grey in (first, second))
    if pattern == "plain":
        mix = np.zeros_like(_X)
    elif pattern == "gradient":
        mix = _Y / IMAGE_SIZE
    elif pattern == "stripes":
        mix = (_X // 8) % 2
    else:
        mix = (_X // 16 + _Y // 16) % 2
    return a + mix[..., None] * (b - a)


def _object_colour(obj: SceneObject, dx: Field, dy: Field) -> Field:
    """The colour of an object at every pixel; shading changes the brightness and hardly the hue."""
    colour = np.array(COLOURS[obj.colour], dtype=np.float32)
    if obj.shading == "shaded":
        return colour * (0.95 - 0.3 * np.clip(dy / obj.radius, -1, 1))[..., None]
    if obj.shading == "banded":
        return colour * np.where((_Y // 4) % 2 == 0, 1.0, 0.7)[..., None]
    if obj.shading == "glossy":
        squared_distance = (dx + 0.35 * obj.radius) ** 2 + (dy + 0.35 * obj.radius) ** 2
        highlight = 0.55 * np.exp(-squared_distance / (0.3 * obj.radius) ** 2)[..., None]
        return colour + highlight * (255 - colour)
    return np.broadcast_to(colour, (IMAGE_SIZE, IMAGE_SIZE, 3))


def random_scene(kind: str, rng: Generator) -> Scene:
    """Sample a scene that a caption of this GenEval kind can describe."""
    first, second = rng.permutation(len(GREYS))[:2]
    background = str(rng.choice(BACKGROUNDS))
    return Scene(kind, background, (int(first), int(second)), tuple(_random_objects(kind, rng)))


def random_scenes(count: int, seed: int) -> list[Scene]:
    """Sample `count` scenes, cycling through the kinds; deterministic for a seed."""
    rng = np.random.default_rng(seed)
    return [random_scene(KINDS[i % len(KINDS)], rng) for i in range(count)]


def _random_objects(kind: str, rng: Generator) -> list[SceneObject]:
    shapes = [str(name) for name in rng.permutation(SHAPES)]
    colours = [str(name) for name in rng.permutation(list(COLOURS))]
    shading = str(rng.choice(SHADINGS))
    if kind in ("single_object", "colors"):
        radius = int(rng.choice((MEDIUM, LARGE)))
        centres = [tuple(_snap_to_grid(rng.uniform(radius + 1, IMAGE_SIZE - radius - 1, 2)))]
        radii = [radius]
    elif kind == "counting":
        number = int(rng.integers(2, 5))
        radii = [SMALL if number > 2 else int(rng.choice((SMALL, MEDIUM)))] * number
        centres = _corner_centres(number, 2 * radii[0] + MIN_GAP, rng)
        shapes, colours = shapes[:1] * number, colours[:1] * number
    else:
        radii = [int(rng.choice((SMALL, MEDIUM))) for _ in range(2)]
        centres = _pair_centres(radii, rng)
    return [
        SceneObject(shapes[i], colours[i], radii[i], int(centre[0]), int(centre[1]), shading)
        for i, centre in enumerate(centres)
    ]


def _pair_centres(radii: list[int], rng: Generator) -> list[NDArray[np.int64]]:
    """Two centres, one clearly to the side of or clearly above the other."""
    low, high = max(radii) + 2, IMAGE_SIZE - max(radii) - 2
    while True:
        centres = [_snap_to_grid(rng.uniform(low, high, 2)) for _ in range(2)]
        near, far = sorted(np.abs(centres[0] - centres[1]))
        if far >= sum(radii) + MIN_GAP and near <= 2 * GRID:
            return centres


def _corner_centres(number: int, distance: int, rng: Generator) -> list[NDArray[np.int64]]:
    """Centres near different corners of a square, at least `distance` apart along one axis."""
    while True:
        corners = rng.permutation(4)[:number]
        points = np.stack([16 + 32 * (corners % 2), 16 + 32 * (corners // 2)], axis=1)
        centres = [_snap_to_grid(point + rng.uniform(-6, 6, 2)) for point in points]
        if all(np.abs(a - b).max() >= distance for a, b in combinations(centres, 2)):
            return centres


def _snap_to_grid(point: NDArray[np.float64]) -> NDArray[np.int64]:
    return (np.round(np.asarray(point) / GRID) * GRID).astype(np.int64)
