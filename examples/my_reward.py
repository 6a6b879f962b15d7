"""Two rewards of one's own: one looks at the images only, one also at a field of the prompt file.

    PYTHONPATH=examples torchrun -m iris_fast.train --reward_funcs '[my_reward:saturation]'

docs/rewards.md explains the interface.
"""

from __future__ import annotations

from PIL import ImageStat
from PIL.Image import Image


def saturation(prompts: list[str], images: list[Image]) -> list[float]:
    """Mean saturation of each image, in [0, 1]."""
    means = [ImageStat.Stat(image.convert("HSV")).mean for image in images]
    return [channel_s / 255 for _, channel_s, _ in means]


def one_object(prompts: list[str], images: list[Image], tag: list[str | None]) -> list[float]:
    """`saturation` for prompts whose field `tag` is `single_object`, 0 for all others.

    `tag` is the field of that name in the prompt file, one entry per image, None where a line
    does not have it.
    """
    values = saturation(prompts, images)
    return [
        value if kind == "single_object" else 0.0 for value, kind in zip(values, tag, strict=True)
    ]
