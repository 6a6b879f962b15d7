"""Image codes -> pixels -> PNG files and grids."""

import math
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from iris_fast.errors import UserError, atomic_write
from iris_fast.models.vq import VQModel, to_uint8

GAP_PIXELS = 4
CPU_BATCH = 4  # images that are decoded together; half the time of one by one on two cores


@torch.no_grad()
def decode_images(vq: VQModel, codes_NI: Tensor) -> list[Image.Image]:
    """One RGB image per row of codes, a square grid read row by row.

    Convolutions round differently in batches of different sizes, and equal codes should give equal
    images: all batches have the same size, the last one is filled up with its last row.
    """
    device = next(vq.parameters()).device
    size = CPU_BATCH if device.type == "cpu" else 1  # one image keeps a GPU busy
    pixels = []
    for codes in codes_NI.split(size):
        filled = torch.cat([codes, codes[-1:].expand(size - len(codes), -1)])
        pixels += to_uint8(vq.decode(filled.to(device)))[: len(codes)].cpu()
    return [Image.fromarray(image.numpy()) for image in pixels]


def check_image_tokens(setting: int | None, model_tokens: int) -> int:
    """Tokens per image: the setting, or what the model's image size gives."""
    if setting is None:
        return model_tokens
    if math.isqrt(setting) ** 2 != setting or setting > model_tokens:
        raise UserError(
            f"image_token_num_per_image: {setting} is not a square number up to {model_tokens}, "
            "the tokens of this model's images; leave it out"
        )
    return setting


def grid(rows: list[list[Image.Image]], captions: list[str]) -> Image.Image:
    """Images in rows, each row under its caption (cut to the row's width)."""
    width, height = rows[0][0].size
    font = ImageFont.load_default(size=max(11, height // 24))
    caption_height = sum(font.getmetrics()) + GAP_PIXELS
    row_height = height + caption_height + GAP_PIXELS
    sheet_width = len(rows[0]) * (width + GAP_PIXELS) + GAP_PIXELS
    sheet = Image.new("RGB", (sheet_width, len(rows) * row_height), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (images, caption) in enumerate(zip(rows, captions, strict=True)):
        top = number * row_height
        text = " ".join(caption.split())
        while text and pen.textlength(text, font=font) > sheet.width - 2 * GAP_PIXELS:
            text = text[:-2].rstrip("…") + "…" if len(text) > 2 else ""
        pen.text((GAP_PIXELS, top + 1), text, fill="black", font=font)
        for column, image in enumerate(images):
            left = GAP_PIXELS + column * (width + GAP_PIXELS)
            sheet.paste(image, (left, top + caption_height))
    return sheet


def strips(sheet: Image.Image, rows: int, columns: int) -> list[Image.Image]:
    """The rows of a `grid` without their captions."""
    row_height = sheet.height // rows
    height = (sheet.width - GAP_PIXELS) // columns - GAP_PIXELS  # images are square
    bottoms = [(row + 1) * row_height - GAP_PIXELS for row in range(rows)]
    return [sheet.crop((0, bottom - height, sheet.width, bottom)) for bottom in bottoms]


def cells(strip: Image.Image, columns: int) -> list[Image.Image]:
    """The images of one of the `strips`."""
    size = strip.height
    lefts = [GAP_PIXELS + column * (size + GAP_PIXELS) for column in range(columns)]
    return [strip.crop((left, 0, left + size, size)) for left in lefts]


def save_png(image: Image.Image, path: Path) -> None:
    """Write an image, creating its folder if needed; UserError if that fails."""
    with atomic_write("output_dir", path) as partial:
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(partial, format="PNG")
