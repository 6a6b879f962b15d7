"""What is said about the small world: captions, what each one promises, and the chain of thought.

A caption is of one of GenEval's six kinds and comes with an expectation in the form of GenEval's
own metadata: `include` (class, count, and where asked color, position) and `exclude`. `holds` says
whether a list of things keeps the promise; the verifier asks it about the things it saw.

    python -m iris_fast.tiny.captions     writes prompts.jsonl and held_out.jsonl
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import permutations, product
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.random import Generator

from iris_fast.tiny.world import COLOURS, KINDS, RELATIONS, SHAPES, SIDE, Scene

PROMPTS_FILE = Path(__file__).with_name("prompts.jsonl")
HELD_OUT_FILE = Path(__file__).with_name("held_out.jsonl")
PROMPTS_SEED = 2025
TRAIN_PER_KIND, HELD_OUT_PER_KIND = 40, 20

NUMBERS = {2: "two", 3: "three", 4: "four"}
_OPENINGS = ("", "a picture of ", "a drawing of ", "there is ")
_PAIR = ("{a} and {b}", "{a} with {b}", "{a} next to {b}")
_SAID = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}
# Centres must differ by this much, and mostly in the direction that is spoken of.
POSITION_MARGIN = 8.0


class Placed(Protocol):
    """What can be spoken of: a `Thing` of a scene, or one that the verifier saw."""

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
    """A prompt, its GenEval kind (`tag`), and what a picture of it must and must not hold."""

    text: str
    tag: str
    include: tuple[dict[str, Any], ...]
    exclude: tuple[dict[str, Any], ...] = ()

    def line(self) -> str:
        """One line of a prompt file."""
        fields = {"tag": self.tag, "include": self.include, "exclude": self.exclude}
        return json.dumps({"prompt": self.text, **fields})


def _wanted(shape: str, count: int = 1, **more: Any) -> dict[str, Any]:
    return {"class": shape, "count": count, **more}


def single_captions(shape: str) -> list[Caption]:
    """`a circle`, in several phrasings."""
    texts = [f"{opening}a {shape}" for opening in _OPENINGS]
    texts += [f"one {shape}", f"a single {shape}", f"a lone {shape}", f"just a {shape}"]
    return [Caption(text, "single_object", (_wanted(shape),)) for text in texts]


def color_captions(shape: str, colour: str) -> list[Caption]:
    """`a red circle`, in several phrasings."""
    texts = [f"{opening}a {colour} {shape}" for opening in _OPENINGS]
    texts += [f"one {colour} {shape}", f"a {shape} in {colour}"]
    return [Caption(text, "colors", (_wanted(shape, color=colour),)) for text in texts]


def two_captions(first: str, second: str) -> list[Caption]:
    """`a circle and a square`, in several phrasings."""
    texts = [
        opening + pair.format(a=f"a {first}", b=f"a {second}")
        for opening, pair in product(_OPENINGS, _PAIR)
    ]
    return [Caption(text, "two_object", (_wanted(first), _wanted(second))) for text in texts]


def counting_captions(shape: str, number: int) -> list[Caption]:
    """`three circles`, in several phrasings: exactly so many."""
    many = f"{NUMBERS[number]} {plural(shape)}"
    texts = [f"{opening}{many}" for opening in ("", "a picture of ", "a drawing of ", "there are ")]
    texts += [f"a group of {many}", f"exactly {many}"]
    include, exclude = (_wanted(shape, number),), (_wanted(shape, number + 1),)
    return [Caption(text, "counting", include, exclude) for text in texts]


def position_captions(first: str, relation: str, second: str) -> list[Caption]:
    """`a circle left of a square`, in several phrasings."""
    include = (_wanted(second), _wanted(first, position=[relation, 0]))
    return [
        Caption(f"{opening}a {first} {said} a {second}", "position", include)
        for opening, said in product(_OPENINGS, _SAID[relation])
    ]


def attribution_captions(one: tuple[str, str], other: tuple[str, str]) -> list[Caption]:
    """`a red circle and a blue square` from (shape, colour) twice, in several phrasings."""
    (first, red), (second, blue) = one, other
    include = (_wanted(first, color=red), _wanted(second, color=blue))
    texts = [
        opening + pair.format(a=f"a {red} {first}", b=f"a {blue} {second}")
        for opening, pair in product(_OPENINGS, _PAIR)
    ]
    return [Caption(text, "color_attr", include) for text in texts]


def plural(shape: str) -> str:
    """`circles`, `crosses`."""
    return shape + ("es" if shape.endswith("s") else "s")


def all_captions(kind: str) -> list[Caption]:
    """Every caption of a kind."""
    pairs = list(permutations(SHAPES, 2))
    colours = list(permutations(COLOURS, 2))
    lists: dict[str, Any] = {
        "single_object": lambda: map(single_captions, SHAPES),
        "two_object": lambda: (two_captions(*pair) for pair in pairs),
        "counting": lambda: (counting_captions(*x) for x in product(SHAPES, NUMBERS)),
        "colors": lambda: (color_captions(*x) for x in product(SHAPES, COLOURS)),
        "position": lambda: (position_captions(a, r, b) for (a, b), r in product(pairs, RELATIONS)),
        "color_attr": lambda: (
            attribution_captions((a, c), (b, d)) for (a, b), (c, d) in product(pairs, colours)
        ),
    }
    return [caption for captions in lists[kind]() for caption in captions]


@cache
def prompt_sets() -> tuple[tuple[Caption, ...], tuple[Caption, ...]]:
    """Training prompts and held-out prompts: disjoint, every kind in both, the same every time."""
    rng = np.random.default_rng(PROMPTS_SEED)
    train: list[Caption] = []
    held_out: list[Caption] = []
    for kind in KINDS:
        captions = all_captions(kind)
        order = rng.permutation(len(captions))
        kept = min(HELD_OUT_PER_KIND, len(captions) // 4)
        held_out += [captions[i] for i in order[:kept]]
        train += [captions[i] for i in order[kept : kept + TRAIN_PER_KIND]]
    return tuple(train), tuple(held_out)


def caption_of(scene: Scene, rng: Generator) -> Caption:
    """A true caption of a scene's kind; never one of the held-out prompts."""
    held_out = {caption.text for caption in prompt_sets()[1]}
    choices = [c for c in true_captions(scene, scene.kind, rng) if c.text not in held_out]
    return choices[rng.integers(len(choices))]


def true_captions(scene: Scene, kind: str, rng: Generator) -> list[Caption]:
    """All phrasings of what a scene of this kind shows; the order of two things is drawn."""
    things = [scene.things[i] for i in rng.permutation(len(scene.things))]
    first, second = things[0], things[-1]
    if kind == "single_object":
        return single_captions(first.shape)
    if kind == "colors":
        return color_captions(first.shape, first.colour)
    if kind == "counting":
        return counting_captions(first.shape, len(things))
    if kind == "two_object":
        return two_captions(first.shape, second.shape)
    if kind == "color_attr":
        return attribution_captions((first.shape, first.colour), (second.shape, second.colour))
    relation = next(r for r in RELATIONS if related(first, r, second))
    return position_captions(first.shape, relation, second.shape)


def related(first: Placed, relation: str, second: Placed) -> bool:
    """Whether `first` is clearly left of, right of, above or below `second`."""
    dx, dy = first.x - second.x, first.y - second.y
    along = {"left of": -dx, "right of": dx, "above": -dy, "below": dy}[relation]
    across = dy if relation in ("left of", "right of") else dx
    return along >= POSITION_MARGIN and along >= abs(across)


def holds(
    things: Sequence[Placed], include: Sequence[dict[str, Any]], exclude: Sequence[dict[str, Any]]
) -> bool:
    """Whether the things keep an expectation, by GenEval's rules.

    Of each included class at least `count` things of its color, if it names one, and at least one
    in its `position` to a thing of the include entry that the position points to; of each excluded
    class fewer than `count`.
    """

    def matching(entry: dict[str, Any]) -> list[Placed]:
        colour = entry.get("color")
        return [t for t in things if t.shape == entry["class"] and colour in (None, t.colour)]

    for entry in include:
        found = matching(entry)
        if len(found) < entry["count"]:
            return False
        if entry.get("position") is not None:
            relation, target = entry["position"]
            others = matching(include[target])
            if not any(related(a, relation, b) for a, b in product(found, others)):
                return False
    return all(len(matching(entry)) < entry["count"] for entry in exclude)


def place(thing: Placed) -> str:
    """`top left`, `right`, `middle`, ...: which ninth of the picture a centre lies in."""

    def third(value: float, low: str, high: str) -> str:
        return low if value < SIDE * 0.4 else high if value > SIDE * 0.6 else ""

    words = (third(thing.y, "top", "bottom"), third(thing.x, "left", "right"))
    return " ".join(word for word in words if word) or "middle"


def chain_of_thought(scene: Scene) -> str:
    """A rephrasing that names every thing: `red circle top left, blue square right`.

    Things come in reading order of a coarse grid, so that there is one right answer for a scene.
    """
    things = sorted(scene.things, key=lambda t: (t.y // 22, t.x))
    return ", ".join(f"{thing.colour} {thing.shape} {place(thing)}" for thing in things)


def main() -> None:
    """Write both prompt files."""
    for path, captions in zip((PROMPTS_FILE, HELD_OUT_FILE), prompt_sets(), strict=True):
        text = "".join(caption.line() + "\n" for caption in captions)
        path.write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
