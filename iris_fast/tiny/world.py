"""The synthetic world: textured things on a quiet ground, as records, as image codes and as images.

An image is a grid of 8 x 8 cells of 4 x 4 pixels, and every cell shows one of 1568 known tiles:
the tile's number is the image code, so `render` is a table lookup. A thing covers five cells of a
block of 3 x 3 in one of the four corners, so that no shape is harder to predict than another. Each
of its cells is drawn from 256 textures of the thing's colour, so that the content of a picture is
hard to predict and its ground is not, as in photographs. A quarter of the things have one cell of
any colour, so that no cell of a thing is certain of its colour.

A `World` names what varies: `omission` is the share of the things a caption names that are missing
from the picture, as in the captions of the web. The other two worlds of `WORLDS` are controls.

    code                           tile
    variant                        ground
    32 + colour * 256 + variant    cell of a thing
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

CELL, SIDE, THING = 4, 8, 3  # pixels per cell; cells per side of an image, and of a thing
IMAGE_SIZE = CELL * SIDE
PLACES = tuple(product((0, SIDE - THING), repeat=2))  # top left cells of the things, four corners
Pixels = NDArray[np.uint8]
Codes = NDArray[np.int64]
Field = NDArray[np.float32]

# Hues at least 43 degrees apart, so that a shade is never nearest to another colour.
COLOURS = {
    "red": (220, 40, 40),
    "yellow": (240, 210, 40),
    "green": (40, 170, 70),
    "cyan": (40, 195, 210),
    "blue": (40, 80, 215),
    "purple": (165, 55, 205),
}
# Nearly grey, so that every saturated region of an image belongs to a thing.
GROUND = (228, 226, 220)
KINDS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
RELATIONS = ("left of", "right of", "above", "below")

# The cells of every shape. All touch the four sides of the block.
LAYOUTS = {
    "cross": (".#.", "###", ".#."),
    "corner": ("#..", "#..", "###"),
    "stair": ("#..", "##.", ".##"),
    "bolt": ("##.", ".#.", ".##"),
    "tee": ("###", ".#.", ".#."),
}
SHAPES = tuple(LAYOUTS)

# A texture is a shade and a pattern; variant 0, shade 0 with pattern 0, is the plain one.
SHADES = (0.0, -0.36, 0.36, -0.12, 0.12, -0.24, 0.24, -0.45)  # towards black, or towards white
GROUND_SHADES = (0, -8, -16, -24)  # added to the ground
PATTERN_DEPTH = 0.22  # how much darker a pattern's marks are
# The marks of a pattern are those of the sum (exclusive or) of some of these.
MARKS = np.zeros((5, CELL, CELL), bool)
MARKS[0, 1::2] = MARKS[1, :, 1::2] = MARKS[2, :2] = MARKS[3, :, :2] = MARKS[4, 1:3, 1:3] = True

# Shades and patterns of a cell of the ground, and of a cell of a thing.
GROUND_LOOKS, LOOKS = (4, 8), (8, 32)
GROUND_VARIANTS, VARIANTS = (shades * patterns for shades, patterns in (GROUND_LOOKS, LOOKS))
NUM_CODES = GROUND_VARIANTS + len(COLOURS) * VARIANTS


@dataclass(frozen=True)
class World:
    """What the pictures of a caption are like."""

    omission: float = 0.3  # share of the named things that are missing from the picture
    textured: bool = True  # whether the cells of a thing have textures at random
    speckled: float = 0.25  # share of the things with one cell of any colour
    busy_ground: bool = False  # whether the cells of the ground have textures at random


# The package's model is trained on `shipped`. In `kept` there is nothing to gain from a picture
# that shows more; in `busy` what is hard to predict is the ground.
WORLDS = {
    "shipped": World(),
    "kept": World(omission=0.0),
    "busy": World(textured=False, speckled=0.0, busy_ground=True),
}
FAITHFUL = World(omission=0.0)  # for measurements that need pictures true of their captions


@dataclass(frozen=True)
class SceneObject:
    """One thing that the caption may name. `row`, `column`: its top left cell."""

    shape: str
    colour: str
    row: int
    column: int
    shown: bool = True

    @property
    def x(self) -> float:
        """Centre in pixels from the left."""
        return CELL * (self.column + THING / 2)

    @property
    def y(self) -> float:
        """Centre in pixels from the top."""
        return CELL * (self.row + THING / 2)


@dataclass(frozen=True)
class Scene:
    """The content of an image: a kind that describes it, its named things, its codes by rows."""

    kind: str
    objects: tuple[SceneObject, ...]
    codes: tuple[int, ...]

    @property
    def shown(self) -> tuple[SceneObject, ...]:
        """The things that the picture shows."""
        return tuple(obj for obj in self.objects if obj.shown)


def shape_mask(shape: str) -> NDArray[np.bool_]:
    """Which cells of its block a shape covers, [3, 3]."""
    return np.array([[mark == "#" for mark in row] for row in LAYOUTS[shape]])


@cache
def tiles() -> Pixels:
    """The tile of every code, uint8 [1568, 4, 4, 3]."""
    table = np.empty((NUM_CODES, CELL, CELL, 3), np.float32)
    ground = np.array(GROUND, np.float32)
    for variant in range(GROUND_VARIANTS):
        shade, pattern = look(variant, GROUND_LOOKS)
        marks = 1 - PATTERN_DEPTH / 2 * _marks(pattern)[..., None]
        table[variant] = (ground + GROUND_SHADES[shade]) * marks
    for index, rgb in enumerate(COLOURS.values()):
        for variant in range(VARIANTS):
            textured = _textured(np.array(rgb, np.float32), *look(variant, LOOKS))
            table[thing_code(index, variant)] = textured
    return np.clip(table + 0.5, 0, 255).astype(np.uint8)


@cache
def tile_features() -> Field:
    """What a tile shows, [1568, 20] of 0 and 1: colour, shade, and the marks' summands."""
    colours, shades = 1 + len(COLOURS), len(SHADES)
    table = np.zeros((NUM_CODES, colours + shades + len(MARKS)), np.float32)

    def fill(code: int, colour: int, shade: int, pattern: int) -> None:
        table[code, [colour, colours + shade]] = 1
        table[code, -len(MARKS) :] = [pattern >> bit & 1 for bit in range(len(MARKS))]

    for variant in range(GROUND_VARIANTS):
        fill(variant, 0, *look(variant, GROUND_LOOKS))
    for colour, variant in product(range(len(COLOURS)), range(VARIANTS)):
        fill(thing_code(colour, variant), 1 + colour, *look(variant, LOOKS))
    return table


def equally_likely(world: World) -> Codes:
    """The codes [1568, 256] that a world could have drawn instead, each equally often in a row."""
    table = np.repeat(np.arange(NUM_CODES)[:, None], VARIANTS, axis=1)
    variants = np.arange(VARIANTS)
    if world.busy_ground:
        table[:GROUND_VARIANTS] = variants % GROUND_VARIANTS
    if world.textured:
        first = thing_code(np.repeat(np.arange(len(COLOURS)), VARIANTS), 0)
        table[GROUND_VARIANTS:] = first[:, None] + variants
    return table


def look(variant: int, looks: tuple[int, int]) -> tuple[int, int]:
    """Shade and pattern of a variant, of so many shades and patterns."""
    return variant // looks[1], variant % looks[1]


def thing_code(colour: Any, variant: Any) -> Any:
    """Code of a cell of a thing; integers, or arrays of them."""
    return GROUND_VARIANTS + colour * VARIANTS + variant


def _textured(colour: Field, shade: int, pattern: int) -> Field:
    """A cell of a colour, [4, 4, 3]; shade and pattern change the brightness, hardly the hue."""
    amount = SHADES[shade]
    shaded = colour * (1 + amount) if amount < 0 else colour + amount * (255 - colour)
    return shaded * (1 - PATTERN_DEPTH * _marks(pattern)[..., None])


def _marks(pattern: int) -> Field:
    """Where a pattern is dark, [4, 4]."""
    summands = [marks for bit, marks in enumerate(MARKS) if pattern >> bit & 1]
    return np.logical_xor.reduce([np.zeros_like(MARKS[0]), *summands]).astype(np.float32)


def render(scene: Scene) -> Pixels:
    """The image of a scene, uint8 [32, 32, 3]."""
    return render_codes(np.array([scene.codes]))[0]


def render_all(scenes: list[Scene]) -> Pixels:
    """The images of scenes, uint8 [N, 32, 32, 3]."""
    return render_codes(scene_codes(scenes))


def scene_codes(scenes: list[Scene]) -> Codes:
    """The codes of scenes, int64 [N, 64]."""
    return np.array([scene.codes for scene in scenes])


def render_codes(codes: Codes) -> Pixels:
    """The images of codes [N, 64], uint8 [N, 32, 32, 3]."""
    cells = tiles()[codes].reshape(len(codes), SIDE, SIDE, CELL, CELL, 3)
    return cells.transpose(0, 1, 3, 2, 4, 5).reshape(len(codes), IMAGE_SIZE, IMAGE_SIZE, 3)


def compose(kind: str, objects: tuple[SceneObject, ...], world: World, rng: Generator) -> Scene:
    """The scene of these things, with textures at random."""
    codes = rng.integers(GROUND_VARIANTS, size=(SIDE, SIDE)) * world.busy_ground
    for obj in objects:
        cells = np.argwhere(shape_mask(obj.shape)) + np.array([obj.row, obj.column])
        colours = np.full(len(cells), list(COLOURS).index(obj.colour))
        speck, any_colour = rng.integers(len(cells)), rng.integers(len(COLOURS))
        if rng.random() < world.speckled:
            colours[speck] = any_colour
        textures = rng.integers(VARIANTS, size=len(cells)) * world.textured
        if obj.shown:
            codes[tuple(cells.T)] = thing_code(colours, textures)
    return Scene(kind, objects, tuple(codes.ravel().tolist()))


def random_scene(kind: str, rng: Generator, world: World = FAITHFUL) -> Scene:
    """Sample a scene that a caption of this GenEval kind can describe."""
    shapes = [str(name) for name in rng.permutation(SHAPES)]
    colours = [str(name) for name in rng.permutation(list(COLOURS))]
    order = rng.permutation(len(PLACES))
    if kind in ("single_object", "colors"):
        order = order[:1]
    elif kind == "counting":
        order = order[: rng.integers(2, 5)]
        shapes, colours = shapes[:1] * len(order), colours[:1] * len(order)
    else:  # beside or above one another: places that differ in one coordinate
        order = np.array([order[0], order[0] ^ (1 + rng.integers(2))])
    places = [PLACES[i] for i in order]
    objects = tuple(
        SceneObject(shape, colour, row, column, bool(rng.random() >= world.omission))
        for shape, colour, (row, column) in zip(shapes, colours, places, strict=False)
    )
    return compose(kind, objects, world, rng)


def random_scenes(count: int, seed: int, world: World = FAITHFUL) -> list[Scene]:
    """Sample `count` scenes, cycling through the kinds; deterministic for a seed."""
    rng = np.random.default_rng(seed)
    return [random_scene(KINDS[i % len(KINDS)], rng, world) for i in range(count)]
