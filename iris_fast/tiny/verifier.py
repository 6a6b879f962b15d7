"""Does a picture of the small world keep its prompt's promise? From pixels alone, no network.

Colourful connected regions are the things (backgrounds are nearly grey); a thing's colour is its
commonest hue, its shape the one whose outline, stretched to its bounding box, overlaps it best.
What was seen is then held against the expectation in the prompt file (`captions.holds`).

As a reward: `--reward_funcs '[iris_fast.tiny.verifier:reward]'`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image, Resampling, fromarray
from scipy import ndimage
from scipy.spatial.distance import pdist, squareform

from iris_fast.tiny.captions import holds
from iris_fast.tiny.world import COLOURS, SHAPES, Pixels, shape_distance

MIN_CHROMA = 62  # of 255: backgrounds stay below 12, half-covered edges of things lie near it
MIN_AREA = 36  # pixels; the smallest thing has 100
MIN_OVERLAP = 0.6  # intersection over union with the best outline
SPLIT_SHARE = 0.2  # a region with this much of a second colour is two things that touch
STRETCH = 1.7  # a bounding box more oblong than this is no thing

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Seen:
    """A thing found in a picture; `x`, `y`: the centre of its bounding box in pixels."""

    shape: str
    colour: str
    x: float
    y: float
    overlap: float


def reward(
    prompts: list[str],
    images: list[Image],
    include: list[Any],
    exclude: list[Any],
) -> list[float]:
    """1 for a picture that keeps its prompt's promise, else 0; an external reward.

    `include` and `exclude` are fields of the prompt file. ValueError if a prompt has none.
    """
    for prompt, wanted in zip(prompts, include, strict=True):
        if wanted is None:
            raise ValueError(f"the prompt {prompt!r} has no field `include` to be checked against")
    return [
        float(holds(see(np.asarray(image.convert("RGB"))), wanted, unwanted or ()))
        for image, wanted, unwanted in zip(images, include, exclude, strict=True)
    ]


def diversity_reward(prompts: list[str], images: list[Image]) -> list[float]:
    """For each picture, its mean distance (see `diversity`) to the others of its prompt; 0 if there
    is no other. The mean over a prompt's pictures is their `diversity`. An external reward."""
    values = np.zeros(len(images))
    names = np.array(prompts)
    for prompt in dict.fromkeys(prompts):
        mine = np.flatnonzero(names == prompt)
        values[mine] = _distances([images[i] for i in mine]).sum(1) / max(len(mine) - 1, 1)
    return values.tolist()


def richness_reward(prompts: list[str], images: list[Image]) -> list[float]:
    """`richness` of each picture; an external reward."""
    return [richness(np.asarray(image.convert("RGB"))) for image in images]


def see(picture: Pixels) -> list[Seen]:
    """The things in a picture [H, W, 3]."""
    colours, chroma = _colour_map(picture)
    regions, count = ndimage.label(chroma >= MIN_CHROMA)
    things = []
    for number in range(1, count + 1):
        region = regions == number
        if region.sum() < MIN_AREA:
            continue
        for colour, mask in _by_colour(region, colours):
            thing = _thing(colour, mask)
            if thing is not None:
                things.append(thing)
    return things


def _colour_map(picture: Pixels) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Number of the nearest colour by hue, and the chroma (max - min over RGB), of every pixel."""
    pixels = picture.astype(np.int64)
    chroma = pixels.max(-1) - pixels.min(-1)
    palette = np.array(list(COLOURS.values()))
    distance = np.abs(_hue(pixels)[..., None] - _hue(palette))
    return np.minimum(distance, 6 - distance).argmin(-1), chroma


def _hue(pixels: NDArray[np.int64]) -> NDArray[np.float64]:
    """Hue in [0, 6), the sextants of the colour wheel; 0 for a grey."""
    red, green, blue = np.moveaxis(pixels.astype(np.float64), -1, 0)
    high, low = pixels.max(-1), pixels.min(-1)
    span = np.maximum(high - low, 1)
    hue = np.where(
        high == red,
        (green - blue) / span % 6,
        np.where(high == green, (blue - red) / span + 2, (red - green) / span + 4),
    )
    return hue


def _by_colour(region: Mask, colours: NDArray[np.int64]) -> list[tuple[str, Mask]]:
    """The region whole under its commonest colour, or cut up if a second one has a good share."""
    names = list(COLOURS)
    shares = np.bincount(colours[region], minlength=len(names)) / region.sum()
    strong = [i for i in range(len(names)) if shares[i] >= SPLIT_SHARE]
    if len(strong) <= 1:
        return [(names[int(shares.argmax())], region)]
    parts = []
    for index in strong:
        pieces, count = ndimage.label(region & (colours == index))
        sizes = ndimage.sum_labels(np.ones_like(pieces), pieces, range(1, count + 1))
        parts += [
            (names[index], pieces == number)
            for number, size in enumerate(sizes, start=1)
            if size >= MIN_AREA
        ]
    return parts


def _thing(colour: str, mask: Mask) -> Seen | None:
    """Name the shape of a region; None if it is like no shape of this world."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    height, width = int(bottom - top), int(right - left)
    if max(height, width) > STRETCH * min(height, width):
        return None
    piece = mask[top:bottom, left:right]
    overlaps = {
        shape: float((piece & outline).sum() / (piece | outline).sum())
        for shape, outline in _outlines(height, width).items()
    }
    best = max(overlaps, key=overlaps.__getitem__)
    if overlaps[best] < MIN_OVERLAP:
        return None
    return Seen(best, colour, (left + right) / 2, (top + bottom) / 2, overlaps[best])


@cache
def _outlines(height: int, width: int) -> dict[str, Mask]:
    """Every shape stretched to a box of this size."""
    y, x = (((np.arange(size, dtype=np.float32) + 0.5) / size * 2 - 1) for size in (height, width))
    dx, dy = np.meshgrid(x, y)
    return {shape: shape_distance(shape, dx, dy, 1.0) <= 0 for shape in SHAPES}


def accuracy(
    pictures: Pixels, includes: Sequence[Any], excludes: Sequence[Any]
) -> NDArray[np.bool_]:
    """Which of the pictures [N, H, W, 3] keep their promises."""
    return np.array(
        [
            holds(see(picture), wanted, unwanted or ())
            for picture, wanted, unwanted in zip(pictures, includes, excludes, strict=True)
        ]
    )


def diversity(pictures: Pixels) -> float:
    """How much the pictures [N, H, W, 3] of one group differ, 0 (all the same) to 1.

    The mean over pairs of the root mean square difference of the pictures, averaged down to 16 x
    16 so that neither noise nor a shift by a pixel counts much, over 255. 0 for one picture.
    """
    count = len(pictures)
    total = _distances([fromarray(picture) for picture in pictures]).sum()
    return float(total / max(count * (count - 1), 1))


def _distances(images: Sequence[Image]) -> NDArray[np.float64]:
    """[N, N]: between any two pictures, at 16 x 16 pixels."""
    small = [np.asarray(image.convert("RGB").resize((16, 16), Resampling.BOX)) for image in images]
    return squareform(pdist(np.stack(small).reshape(len(small), -1) / 255.0)) / (16 * 16 * 3) ** 0.5


def colour_entropy(picture: Pixels) -> float:
    """Entropy in bits of the picture's colours in 8 x 8 x 8 equal bins of RGB, 0 to 9."""
    bins = (picture.reshape(-1, 3) // 32).astype(np.int64) @ np.array([64, 8, 1])
    shares = np.bincount(bins) / len(bins)
    shares = shares[shares > 0]
    return float(-(shares * np.log2(shares)).sum())


def edge_energy(picture: Pixels) -> float:
    """Mean absolute difference of neighbouring pixels, to the right and below, over 255."""
    wide = picture.astype(np.float64) / 255
    across, down = np.abs(np.diff(wide, axis=1)).mean(), np.abs(np.diff(wide, axis=0)).mean()
    return float((across + down) / 2)


def richness(picture: Pixels) -> float:
    """colour_entropy + 20 * edge_energy.

    The factor gives both about the same spread over this world's scenes. A uniform picture has 0.
    """
    return colour_entropy(picture) + 20 * edge_energy(picture)
