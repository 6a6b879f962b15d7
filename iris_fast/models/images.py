"""Image codes -> pixels -> PNG files and grids."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from iris_fast.errors import UserError, atomic_write
from iris_fast.models.vq import VQModel, to_uint8

GAP_PIXELS = 4


@torch.no_grad()
def decode_images(vq: VQModel, codes_NI: Tensor) -> list[Image.Image]:
    """One RGB picture for each row of codes, a square grid read row by row.

    Decoded one by one: convolutions round differently in batches of different sizes, and equal
    codes should be equal pictures. A single one keeps a GPU busy, and a CPU is faster so.
    """
    device = next(vq.parameters()).device
    pictures = []
    for part in codes_NI.split(1):
        pixels = to_uint8(vq.decode(part.to(device))).cpu().numpy()
        pictures += [Image.fromarray(picture) for picture in pixels]
    return pictures


def check_image_tokens(asked: int | None, checkpoint_tokens: int) -> int:
    """Tokens per image: as asked, or what the checkpoint's image size gives."""
    if asked is None:
        return checkpoint_tokens
    if math.isqrt(asked) ** 2 != asked or asked > checkpoint_tokens:
        raise UserError(
            f"image_token_num_per_image: {asked} is no square up to the {checkpoint_tokens} tokens "
            "that this model draws; leave it out"
        )
    return asked


def grid(rows: list[list[Image.Image]], captions: list[str]) -> Image.Image:
    """Pictures in rows, each row under its caption (cut to the row's width)."""
    width, height = rows[0][0].size
    font = ImageFont.load_default(size=max(11, height // 24))
    caption_height = sum(font.getmetrics()) + GAP_PIXELS
    row_height = height + caption_height + GAP_PIXELS
    columns = len(rows[0])
    sheet = Image.new(
        "RGB", (columns * (width + GAP_PIXELS) + GAP_PIXELS, len(rows) * row_height), "white"
    )
    pen = ImageDraw.Draw(sheet)
    for number, (pictures, caption) in enumerate(zip(rows, captions, strict=True)):
        top = number * row_height
        text = " ".join(caption.split())
        while text and pen.textlength(text, font=font) > sheet.width - 2 * GAP_PIXELS:
            text = text[:-2].rstrip("…") + "…" if len(text) > 2 else ""
        pen.text((GAP_PIXELS, top + 1), text, fill="black", font=font)
        for column, picture in enumerate(pictures):
            left = GAP_PIXELS + column * (width + GAP_PIXELS)
            sheet.paste(picture, (left, top + caption_height))
    return sheet


def strips(sheet: Image.Image, rows: int, columns: int) -> list[Image.Image]:
    """The rows of a `grid`, without their captions."""
    row_height = sheet.height // rows
    height = (sheet.width - GAP_PIXELS) // columns - GAP_PIXELS  # pictures are square
    bottoms = [(row + 1) * row_height - GAP_PIXELS for row in range(rows)]
    return [sheet.crop((0, bottom - height, sheet.width, bottom)) for bottom in bottoms]


def save_png(picture: Image.Image, path: Path) -> None:
    """Write it, in a new folder if need be. UserError if the disk does not take it."""
    with atomic_write("output_dir", path) as partial:
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(partial, format="PNG")
