"""Captions of the synthetic world, their requirements, and the chain of thought.

A caption is of one of GenEval's six kinds and comes with requirements in the format of GenEval's
metadata: `include` (class, count and, where the caption has them, color and position) and
`exclude`. `satisfies` tests a list of objects against them; the verifier applies it to the objects
that it detects.

    python -m iris_fast.tiny.captions     writes prompts.jsonl and held_out.jsonl
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain, permutations, product
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.random import Generator

from iris_fast.tiny.world import COLOURS, IMAGE_SIZE, KINDS, RELATIONS, SHAPES, Scene

PROMPTS_FILE = Path(__file__).with_name("prompts.jsonl")
HELD_OUT_FILE = Path(__file__).with_name("held_out.jsonl")
PROMPTS_SEED = 2025
TRAIN_PER_KIND, HELD_OUT_PER_KIND = 40, 20

NUMBERS = {2: "two", 3: "three", 4: "four"}
_PREFIXES = ("", "a picture of ", "a drawing of ", "there is ")
_PAIR_TEMPLATES = ("{a} and {b}", "{a} with {b}", "{a} next to {b}")
_RELATION_PHRASES = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
# Two centres must be this far apart along the axis of the relation, in pixels.
POSITION_MARGIN = 4.0


class LocatedObject(Protocol):
    """An object of a scene (`SceneObject`) or of an image (`DetectedObject`)."""

    @property
    def shape(self) -> str: ...  # noqa: D102
    @property
    def colour(self) -> str: ...  # noqa: D102
    @property
    def x(self) -> float: ...  # noqa: D102
    @property
    def y(self) -> float: ...  # noqa: D102


@dataclass(frozen=True)
class Caption:
    """A prompt, its GenEval kind (`tag`), and what an image of it must and must not contain."""

    text: str
    tag: str
    include: tuple[dict[str, Any], ...]
    exclude: tuple[dict[str, Any], ...] = ()

    def to_json(self) -> str:
        """One line of a prompt file."""
        fields = {"tag": self.tag, "include": self.include, "exclude": self.exclude}
        return json.dumps({"prompt": self.text, **fields})


def _requirement(shape: str, count: int = 1, **more: Any) -> dict[str, Any]:
    return {"class": shape, "count": count, **more}


def single_captions(shape: str) -> list[Caption]:
    """All phrasings of `a cross`."""
    texts = [f"{prefix}a {shape}" for prefix in _PREFIXES]
    texts += [f"one {shape}", f"a single {shape}", f"a lone {shape}", f"just a {shape}"]
    return [Caption(text, "single_object", (_requirement(shape),)) for text in texts]


def color_captions(shape: str, colour: str) -> list[Caption]:
    """All phrasings of `a red cross`."""
    texts = [f"{prefix}a {colour} {shape}" for prefix in _PREFIXES]
    texts += [f"one {colour} {shape}", f"a {shape} in {colour}"]
    return [Caption(text, "colors", (_requirement(shape, color=colour),)) for text in texts]


def two_captions(first: str, second: str) -> list[Caption]:
    """All phrasings of `a cross and a corner`."""
    texts = [
        prefix + pair.format(a=f"a {first}", b=f"a {second}")
        for prefix, pair in product(_PREFIXES, _PAIR_TEMPLATES)
    ]
    return [
        Caption(text, "two_object", (_requirement(first), _requirement(second))) for text in texts
    ]


def counting_captions(shape: str, number: int) -> list[Caption]:
    """All phrasings of `three crosses`, which requires exactly three."""
    many = f"{NUMBERS[number]} {plural(shape)}"
    texts = [f"{prefix}{many}" for prefix in ("", "a picture of ", "a drawing of ", "there are ")]
    texts += [f"a group of {many}", f"exactly {many}"]
    include, exclude = (_requirement(shape, number),), (_requirement(shape, number + 1),)
    return [Caption(text, "counting", include, exclude) for text in texts]


def position_captions(first: str, relation: str, second: str) -> list[Caption]:
    """All phrasings of `a cross left of a corner`."""
    include = (_requirement(second), _requirement(first, position=[relation, 0]))
    return [
        Caption(f"{prefix}a {first} {phrase} a {second}", "position", include)
        for prefix, phrase in product(_PREFIXES, _RELATION_PHRASES[relation])
    ]


def attribution_captions(one: tuple[str, str], other: tuple[str, str]) -> list[Caption]:
    """All phrasings of `a red cross and a blue corner`, given two (shape, colour) pairs."""
    (first, red), (second, blue) = one, other
    include = (_requirement(first, color=red), _requirement(second, color=blue))
    texts = [
        prefix + pair.format(a=f"a {red} {first}", b=f"a {blue} {second}")
        for prefix, pair in product(_PREFIXES, _PAIR_TEMPLATES)
    ]
    return [Caption(text, "color_attr", include) for text in texts]


def plural(shape: str) -> str:
    """The plural of a shape: `crosses`, `tees`."""
    return shape + ("es" if shape.endswith("s") else "s")


def all_captions(kind: str) -> list[Caption]:
    """All captions of a kind."""
    pairs = list(permutations(SHAPES, 2))
    if kind == "single_object":
        groups = [single_captions(shape) for shape in SHAPES]
    elif kind == "colors":
        groups = [color_captions(shape, colour) for shape, colour in product(SHAPES, COLOURS)]
    elif kind == "counting":
        groups = [counting_captions(shape, number) for shape, number in product(SHAPES, NUMBERS)]
    elif kind == "two_object":
        groups = [two_captions(first, second) for first, second in pairs]
    elif kind == "color_attr":
        groups = [
            attribution_captions((first, colour), (second, other_colour))
            for (first, second), (colour, other_colour) in product(pairs, permutations(COLOURS, 2))
        ]
    else:
        groups = [
            position_captions(first, relation, second)
            for (first, second), relation in product(pairs, RELATIONS)
        ]
    return list(chain.from_iterable(groups))


@cache
def prompt_sets() -> tuple[tuple[Caption, ...], tuple[Caption, ...]]:
    """Training and held-out prompts: disjoint, every kind in both, deterministic."""
    rng = np.random.default_rng(PROMPTS_SEED)
    train: list[Caption] = []
    held_out: list[Caption] = []
    for kind in KINDS:
        captions = all_captions(kind)
        order = rng.permutation(len(captions))
        num_held_out = min(HELD_OUT_PER_KIND, len(captions) // 4)
        held_out += [captions[i] for i in order[:num_held_out]]
        train += [captions[i] for i in order[num_held_out : num_held_out + TRAIN_PER_KIND]]
    return tuple(train), tuple(held_out)


def random_caption(scene: Scene, rng: Generator) -> Caption:
    """Sample a caption of the scene's named things, of its kind, that is not a held-out prompt."""
    held_out = {caption.text for caption in prompt_sets()[1]}
    choices = [c for c in true_captions(scene, scene.kind, rng) if c.text not in held_out]
    return choices[rng.integers(len(choices))]


def true_captions(scene: Scene, kind: str, rng: Generator) -> list[Caption]:
    """All captions of this kind for the named things of a scene; the order of two is random."""
    objects = [scene.objects[i] for i in rng.permutation(len(scene.objects))]
    first, second = objects[0], objects[-1]
    if kind == "single_object":
        return single_captions(first.shape)
    if kind == "colors":
        return color_captions(first.shape, first.colour)
    if kind == "counting":
        return counting_captions(first.shape, len(objects))
    if kind == "two_object":
        return two_captions(first.shape, second.shape)
    if kind == "color_attr":
        return attribution_captions((first.shape, first.colour), (second.shape, second.colour))
    relation = next(r for r in RELATIONS if in_relation(first, r, second))
    return position_captions(first.shape, relation, second.shape)


def in_relation(first: LocatedObject, relation: str, second: LocatedObject) -> bool:
    """Whether `first` is clearly left of, right of, above or below `second`.

    Their centres differ by at least POSITION_MARGIN in that direction, and by no more in the other.
    """
    dx, dy = first.x - second.x, first.y - second.y
    along = {"left of": -dx, "right of": dx, "above": -dy, "below": dy}[relation]
    across = dy if relation in ("left of", "right of") else dx
    return along >= POSITION_MARGIN and along >= abs(across)


def satisfies(
    objects: Sequence[LocatedObject],
    include: Sequence[dict[str, Any]],
    exclude: Sequence[dict[str, Any]],
) -> bool:
    """Whether the objects satisfy a caption's requirements, by GenEval's rules.

    Each `include` entry requires at least `count` objects of its class and, if given, its color;
    with a `position` [relation, index], one of them must be in that relation to an object that
    matches entry `index`. Each `exclude` entry requires fewer than `count` objects of its class.
    """

    def matching(entry: dict[str, Any]) -> list[LocatedObject]:
        colour = entry.get("color")
        return [t for t in objects if t.shape == entry["class"] and colour in (None, t.colour)]

    for entry in include:
        found = matching(entry)
        if len(found) < entry["count"]:
            return False
        if entry.get("position") is not None:
            relation, target = entry["position"]
            others = matching(include[target])
            if not any(in_relation(a, relation, b) for a, b in product(found, others)):
                return False
    return all(len(matching(entry)) < entry["count"] for entry in exclude)


def position_name(located: LocatedObject) -> str:
    """The ninth of the image that a centre lies in: `top left`, `right`, `middle`, ..."""

    def third(value: float, low: str, high: str) -> str:
        return low if value < IMAGE_SIZE * 0.4 else high if value > IMAGE_SIZE * 0.6 else ""

    words = (third(located.y, "top", "bottom"), third(located.x, "left", "right"))
    return " ".join(word for word in words if word) or "middle"


def chain_of_thought(scene: Scene) -> str:
    """List all named things of a scene: `red cross top left, blue corner right`.

    They are in reading order on a coarse grid, so that every scene has exactly one answer.
    """
    objects = sorted(scene.objects, key=lambda obj: (obj.row // 2, obj.column))
    return ", ".join(f"{obj.colour} {obj.shape} {position_name(obj)}" for obj in objects)


def main() -> None:
    """Write both prompt files."""
    for path, captions in zip((PROMPTS_FILE, HELD_OUT_FILE), prompt_sets(), strict=True):
        text = "".join(caption.to_json() + "\n" for caption in captions)
        path.write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
