"""Check whether an image of the synthetic world matches its prompt, without a neural network.

Objects are the saturated connected regions of an image (grounds are nearly grey) that are as large
as a thing. An object's colour is its most frequent hue, its shape the one whose outline, stretched
to the object's bounding box, has the highest intersection over union. A region that resembles no
shape well is a broken thing. The detected objects are then compared with the requirements in the
prompt file (`captions.satisfies`).

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

from iris_fast.tiny.captions import satisfies
from iris_fast.tiny.world import CELL, COLOURS, SHAPES, THING, Pixels, shape_mask

MIN_CHROMA = 30  # of 255: grounds stay below 12, things are at 56 or more
MIN_AREA = 6  # pixels; smaller regions are ignored
SIDES = range(THING * CELL - 1, THING * CELL + 2)  # of a thing's bounding box, in pixels
MIN_IOU = 0.85  # intersection over union with the best outline
SPLIT_SHARE = 0.3  # a region with this share of a second colour is two objects that touch

Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class DetectedObject:
    """An object in an image; `x`, `y`: centre of its bounding box in pixels."""

    shape: str
    colour: str
    x: float
    y: float
    iou: float


def reward(
    prompts: list[str],
    images: list[Image],
    include: list[Any],
    exclude: list[Any],
) -> list[float]:
    """External reward: 1 for an image that matches its prompt, else 0.

    `include` and `exclude` are fields of the prompt file. Raises ValueError for a prompt without
    `include`.
    """
    for prompt, required in zip(prompts, include, strict=True):
        if required is None:
            raise ValueError(
                f"the prompt {prompt!r} has no field `include`, which the verifier needs"
            )
    return [
        float(satisfies(detect_objects(to_array(image)), required, excluded or ()))
        for image, required, excluded in zip(images, include, exclude, strict=True)
    ]


def diversity_reward(prompts: list[str], images: list[Image]) -> list[float]:
    """External reward: mean distance of each image to the other images of its prompt.

    The distance is that of `diversity`, and the mean over a prompt's images is their `diversity`.
    0 for the only image of a prompt.
    """
    values = np.zeros(len(images))
    texts = np.array(prompts)
    for prompt in dict.fromkeys(prompts):
        group = np.flatnonzero(texts == prompt)
        values[group] = _distances([images[i] for i in group]).sum(1) / max(len(group) - 1, 1)
    return values.tolist()


def richness_reward(prompts: list[str], images: list[Image]) -> list[float]:
    """External reward: `richness` of each image."""
    return [richness(to_array(image)) for image in images]


def to_array(image: Image) -> Pixels:
    """The pixels of an image, uint8 [H, W, 3]."""
    return np.asarray(image.convert("RGB"))


def detect_objects(image: Pixels) -> list[DetectedObject]:
    """The objects in an image, uint8 [H, W, 3]."""
    return [found for found in _detect(image) if found is not None]


def broken_things(image: Pixels) -> int:
    """Number of saturated regions that are no thing: of another size, or of no known shape."""
    return sum(found is None for found in _detect(image))


def _detect(image: Pixels) -> list[DetectedObject | None]:
    """What every saturated region of an image shows; None for a broken thing."""
    colours, chroma = _colour_map(image)
    regions, count = ndimage.label(chroma >= MIN_CHROMA)
    objects: list[DetectedObject | None] = []
    for number in range(1, count + 1):
        region = regions == number
        if region.sum() < MIN_AREA:
            continue
        for colour, mask in _split_by_colour(region, colours):
            objects.append(_classify(colour, mask))
    return objects


def _colour_map(image: Pixels) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Index of the nearest colour by hue, and chroma (max - min over RGB), of every pixel."""
    pixels = image.astype(np.int64)
    chroma = pixels.max(-1) - pixels.min(-1)
    palette = np.array(list(COLOURS.values()))
    distance = np.abs(_hue(pixels)[..., None] - _hue(palette))
    return np.minimum(distance, 6 - distance).argmin(-1), chroma


def _hue(pixels: NDArray[np.int64]) -> NDArray[np.float64]:
    """Hue in [0, 6), the sextants of the colour wheel; 0 for grey."""
    red, green, blue = np.moveaxis(pixels.astype(np.float64), -1, 0)
    high, low = pixels.max(-1), pixels.min(-1)
    span = np.maximum(high - low, 1)
    hue = np.where(
        high == red,
        (green - blue) / span % 6,
        np.where(high == green, (blue - red) / span + 2, (red - green) / span + 4),
    )
    return hue


def _split_by_colour(region: Mask, colours: NDArray[np.int64]) -> list[tuple[str, Mask]]:
    """The region with its most frequent colour, or its parts if several colours are frequent."""
    names = list(COLOURS)
    shares = np.bincount(colours[region], minlength=len(names)) / region.sum()
    frequent = [i for i in range(len(names)) if shares[i] >= SPLIT_SHARE]
    if len(frequent) <= 1:
        return [(names[int(shares.argmax())], region)]
    parts = []
    for index in frequent:
        labels, count = ndimage.label(region & (colours == index))
        sizes = ndimage.sum_labels(np.ones_like(labels), labels, range(1, count + 1))
        parts += [
            (names[index], labels == number)
            for number, size in enumerate(sizes, start=1)
            if size >= MIN_AREA
        ]
    return parts


def _classify(colour: str, mask: Mask) -> DetectedObject | None:
    """The object that a region shows; None if it resembles no shape."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    height, width = int(bottom - top), int(right - left)
    if height not in SIDES or width not in SIDES:
        return None
    cropped = mask[top:bottom, left:right]
    ious = {
        shape: float((cropped & outline).sum() / (cropped | outline).sum())
        for shape, outline in _outlines(height, width).items()
    }
    best = max(ious, key=ious.__getitem__)
    if ious[best] < MIN_IOU:
        return None
    return DetectedObject(best, colour, (left + right) / 2, (top + bottom) / 2, ious[best])


@cache
def _outlines(height: int, width: int) -> dict[str, Mask]:
    """Masks of all shapes, stretched to a box of this size."""
    rows, columns = (np.arange(size) * THING // size for size in (height, width))
    return {shape: shape_mask(shape)[np.ix_(rows, columns)] for shape in SHAPES}


def diversity(images: Pixels) -> float:
    """Mean pairwise distance of the images [N, H, W, 3] of one group, from 0 (identical) to 1.

    The distance is the root mean square difference over 255, at 16 x 16 pixels, which makes it
    insensitive to noise. 0 for one image.
    """
    count = len(images)
    total = _distances([fromarray(image) for image in images]).sum()
    return float(total / max(count * (count - 1), 1))


def _distances(images: Sequence[Image]) -> NDArray[np.float64]:
    """Distances [N, N] between images at 16 x 16 pixels."""
    small = [np.asarray(image.convert("RGB").resize((16, 16), Resampling.BOX)) for image in images]
    return squareform(pdist(np.stack(small).reshape(len(small), -1) / 255.0)) / (16 * 16 * 3) ** 0.5


def colour_entropy(image: Pixels) -> float:
    """Entropy in bits of an image's colours in 8 x 8 x 8 equal RGB bins, from 0 to 9."""
    bins = (image.reshape(-1, 3) // 32).astype(np.int64) @ np.array([64, 8, 1])
    shares = np.bincount(bins) / len(bins)
    shares = shares[shares > 0]
    return float(-(shares * np.log2(shares)).sum())


def edge_energy(image: Pixels) -> float:
    """Mean absolute difference of horizontal and of vertical neighbour pixels, over 255."""
    values = image.astype(np.float64) / 255
    across, down = np.abs(np.diff(values, axis=1)).mean(), np.abs(np.diff(values, axis=0)).mean()
    return float((across + down) / 2)


def richness(image: Pixels) -> float:
    """Measure visual complexity as colour_entropy + 20 * edge_energy.

    With this factor both terms vary about equally over the scenes of this world. 0 for a uniform
    image.
    """
    return colour_entropy(image) + 20 * edge_energy(image)
