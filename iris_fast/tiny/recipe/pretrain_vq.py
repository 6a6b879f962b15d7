"""Stage A of the recipe: the VQ of the small world, 64 pixels to 8 x 8 codes.

First a plain autoencoder, its latents on the unit sphere with a growing noise that makes room for
rounding; then k-means of its latents as the codebook; then straight-through training, the codebook
following the latents by moving averages, codes that nothing uses moved onto latents of the batch;
last the pixel decoder alone, while stage B may already learn the codes, which are final by then.
A VQ trained from scratch in the same time gives blobs and wrong hues.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from iris_fast.models.vq import VQConfig, VQModel
from iris_fast.tiny.recipe.training import Course, load_state, save_state

VQ_CONFIG = VQConfig(
    codebook_size=512,
    codebook_dim=8,
    latent_channels=32,
    base_channels=32,
    channel_multiplier=(1, 1, 2, 3),
    num_res_blocks=1,
)


@dataclass(frozen=True)
class VQRecipe:
    """Steps and sizes of stage A."""

    plain_steps: int = 1500
    quantised_steps: int = 700
    frozen_steps: int = 600
    batch_size: int = 16
    learning_rate: float = 1.5e-3
    noise: float = 0.12  # of the plain latents, per dimension, at the end of the plain phase
    commitment: float = 0.25
    decay: float = 0.98  # of the codebook's moving averages
    revive_every: int = 40
    kmeans_images: int = 1024
    seed: int = 11

    @property
    def codes_final(self) -> int:
        """The step from which on the code of a picture does not change any more."""
        return self.plain_steps + self.quantised_steps


def train_vq(images: NDArray[np.uint8], path: Path, recipe: VQRecipe, course: Course) -> VQModel:
    """The VQ trained on `images` [N, 64, 64, 3]; goes on from `path` if that exists."""
    torch.manual_seed(recipe.seed)
    vq = VQModel(VQ_CONFIG)
    total = recipe.codes_final + recipe.frozen_steps
    optimizer = torch.optim.Adam(vq.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98))
    counts = torch.ones(VQ_CONFIG.codebook_size)
    sums = torch.zeros(VQ_CONFIG.codebook_size, VQ_CONFIG.codebook_dim)
    step = 0
    if path.is_file():
        state = load_state(path)
        vq.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, counts, sums = state["step"], state["counts"], state["sums"]
    while step < total:
        if step == recipe.plain_steps:
            sums = kmeans_codebook(vq, images[: recipe.kmeans_images], recipe.seed)
            counts = torch.ones(len(sums))
            vq.quantize.embedding.weight.data.copy_(sums)
        # Numbers drawn from the step alone: a resumed run goes the same way.
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
        picks = torch.randint(len(images), (recipe.batch_size,), generator=generator)
        pixels = to_pixels(images[picks.numpy()])
        course.set_rate(optimizer, recipe.learning_rate, step, total)
        plain, frozen = step < recipe.plain_steps, step >= recipe.codes_final
        with torch.autocast("cpu", torch.bfloat16):
            with torch.set_grad_enabled(not frozen):
                latents = unit_latents(vq, pixels)
            if plain:
                scale = recipe.noise * step / recipe.plain_steps
                noise = torch.randn(latents.shape, generator=generator) * scale
                rows, extra = F.normalize(latents + noise, dim=-1), 0.0
            else:
                rows, codes = straight_through(vq, latents)
                extra = recipe.commitment * F.mse_loss(latents, rows.detach()) * latents.shape[-1]
            drawn = draw(vq, rows)
        loss = picture_loss(drawn.float(), pixels)
        optimizer.zero_grad()
        (loss + extra).backward()
        torch.nn.utils.clip_grad_norm_(vq.parameters(), 1.0)
        optimizer.step()
        if not plain and not frozen:
            revive = step % recipe.revive_every == 0 and step < recipe.codes_final - 100
            _follow(vq, latents.detach(), codes, counts, sums, recipe.decay, revive, generator)
        step += 1
        course.tell("vq", step, total, loss=loss.item(), alive=float((counts > 0.05).sum()))
        if course.due() or step in (recipe.plain_steps, recipe.codes_final, total):
            save_state(
                path,
                model=vq.state_dict(),
                optimizer=optimizer.state_dict(),
                step=step,
                counts=counts,
                sums=sums,
            )
    return vq.eval().requires_grad_(False)


def to_pixels(images: NDArray[np.uint8]) -> Tensor:
    """float32 [B, 3, H, W] in [-1, 1] of uint8 [B, H, W, 3]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1


def unit_latents(vq: VQModel, pixels: Tensor) -> Tensor:
    """Latents [B, I, e] of length 1, before they are rounded to codes."""
    latents = vq.quant_conv(vq.encoder(pixels)).flatten(2).transpose(1, 2)
    return F.normalize(latents.float(), dim=-1)


def draw(vq: VQModel, rows: Tensor) -> Tensor:
    """Pixels of latent rows [B, I, e]: `VQModel.decode` without the look-up."""
    side = round(rows.shape[1] ** 0.5)
    return vq.decoder(vq.post_quant_conv(rows.transpose(1, 2).unflatten(2, (side, side))))


def straight_through(vq: VQModel, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Codebook rows whose gradient goes to the latents unchanged, and the codes."""
    codes = vq.quantize(latents.detach())
    rows = vq.quantize.lookup(codes).detach()
    return latents + (rows - latents).detach(), codes


def picture_loss(drawn: Tensor, pixels: Tensor) -> Tensor:
    """L1 plus squared error, pixels of colourful things counting up to four times as much."""
    chroma = (pixels.amax(1, keepdim=True) - pixels.amin(1, keepdim=True)) / 2
    error = drawn - pixels
    return ((1 + 3 * chroma) * (error.abs() + error.square())).mean()


@torch.no_grad()
def kmeans_codebook(vq: VQModel, images: NDArray[np.uint8], seed: int, rounds: int = 25) -> Tensor:
    """Unit centres [K, e] of the latents of `images`, by spherical k-means.

    Every latent that differs from the others counts once: else the codes would all go to the
    backgrounds, which are most of every picture.
    """
    parts = [unit_latents(vq, to_pixels(images[i : i + 64])) for i in range(0, len(images), 64)]
    points = torch.cat(parts).flatten(0, 1)
    generator = torch.Generator().manual_seed(seed)
    points = points[torch.randperm(len(points), generator=generator)]
    # A rough grid cell of the sphere counts at most a few times.
    _, cell = torch.unique((points * 5).round(), dim=0, return_inverse=True)
    seen = torch.zeros(int(cell.max()) + 1)
    kept = []
    for index, number in enumerate(cell.tolist()):
        if seen[number] < 4:
            seen[number] += 1
            kept.append(index)
    points = points[kept]
    size = vq.config.codebook_size
    centres = points[:size].clone()
    for _ in range(rounds):
        nearest = torch.cat([(part @ centres.T).argmax(1) for part in points.split(4096)])
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        empty = nearest.bincount(minlength=size) == 0
        spare = torch.randint(len(points), (int(empty.sum()),), generator=generator)
        sums[empty] = points[spare]
        centres = F.normalize(sums, dim=-1)
    return centres


@torch.no_grad()
def _follow(
    vq: VQModel,
    latents: Tensor,
    codes: Tensor,
    counts: Tensor,
    sums: Tensor,
    decay: float,
    revive: bool,
    generator: torch.Generator,
) -> None:
    """Move every code towards the mean of its latents; revive the dead on badly served ones."""
    rows, flat = latents.flatten(0, 1), codes.flatten()
    used = flat.bincount(minlength=len(counts)).float()
    counts.mul_(decay).add_(used, alpha=1 - decay)
    sums.mul_(decay).add_(torch.zeros_like(sums).index_add_(0, flat, rows), alpha=1 - decay)
    if revive:
        dead = (counts < 0.05).nonzero().flatten()
        fit = (rows * vq.quantize.lookup(flat)).sum(-1)
        worst = fit.topk(min(len(dead) * 4, len(rows)), largest=False).indices
        chosen = worst[torch.randperm(len(worst), generator=generator)[: len(dead)]]
        sums[dead], counts[dead] = rows[chosen], 1.0
    vq.quantize.embedding.weight.data.copy_(F.normalize(sums, dim=-1))


@torch.no_grad()
def encode_all(vq: VQModel, images: NDArray[np.uint8]) -> Tensor:
    """Codes [N, 64] of all images."""
    return torch.cat([vq.encode(to_pixels(images[i : i + 64])) for i in range(0, len(images), 64)])
