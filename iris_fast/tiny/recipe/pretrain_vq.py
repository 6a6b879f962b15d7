"""Stage A of pretraining: the VQ model, from images of 64 x 64 pixels to 8 x 8 codes.

1. Plain autoencoder: latents on the unit sphere, with increasing noise that makes the decoder
   robust to quantisation.
2. Codebook: spherical k-means of its latents.
3. Quantised training: straight-through gradients, the codebook as moving averages of the latents,
   unused codes reset to latents of the batch.
4. Pixel decoder alone. The codes no longer change, so that stage B can already train on them.

A VQ model trained with quantisation from the start gives blobs and wrong hues in the same time.
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
from iris_fast.tiny.recipe.training import (
    StageProgress,
    load_state,
    save_state,
    set_learning_rate,
)

VQ_CONFIG = VQConfig(
    codebook_size=512,
    codebook_dim=8,
    latent_channels=32,
    base_channels=32,
    channel_multiplier=(1, 1, 2, 3),
    num_res_blocks=1,
)

MIN_COUNT = 0.05  # moving average of uses per batch below which a code counts as unused
MAX_PER_CELL = 4


@dataclass(frozen=True)
class VQRecipe:
    """Steps and sizes of stage A."""

    plain_steps: int = 1500
    quantised_steps: int = 700
    frozen_steps: int = 600
    batch_size: int = 16
    learning_rate: float = 1.5e-3
    noise: float = 0.12  # std per latent dimension at the end of the plain phase
    commitment: float = 0.25
    decay: float = 0.98  # of the codebook's moving averages
    reset_every: int = 40  # steps between resets of unused codes
    kmeans_images: int = 1024
    seed: int = 11

    @property
    def codes_final(self) -> int:
        """The first step at which the codes of an image no longer change."""
        return self.plain_steps + self.quantised_steps


def train_vq(
    images: NDArray[np.uint8], path: Path, recipe: VQRecipe, progress: StageProgress
) -> VQModel:
    """Train the VQ model on `images`, uint8 [N, 64, 64, 3]; resume from `path` if it exists."""
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
        # Seeded by the step alone, so that a resumed run takes the same samples.
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
        picks = torch.randint(len(images), (recipe.batch_size,), generator=generator)
        pixels = to_pixels(images[picks.numpy()])
        set_learning_rate(optimizer, recipe.learning_rate, step, total)
        is_plain, is_frozen = step < recipe.plain_steps, step >= recipe.codes_final
        with torch.autocast("cpu", torch.bfloat16):
            with torch.set_grad_enabled(not is_frozen):
                latents = unit_latents(vq, pixels)
            if is_plain:
                scale = recipe.noise * step / recipe.plain_steps
                noise = torch.randn(latents.shape, generator=generator) * scale
                rows, commitment_loss = F.normalize(latents + noise, dim=-1), 0.0
            else:
                rows, codes = straight_through(vq, latents)
                commitment_loss = (
                    recipe.commitment * F.mse_loss(latents, rows.detach()) * latents.shape[-1]
                )
            output = decode_latents(vq, rows)
        loss = pixel_loss(output.float(), pixels)
        optimizer.zero_grad()
        (loss + commitment_loss).backward()
        torch.nn.utils.clip_grad_norm_(vq.parameters(), 1.0)
        optimizer.step()
        if not is_plain and not is_frozen:
            reset = step % recipe.reset_every == 0 and step < recipe.codes_final - 100
            update_codebook(
                vq, latents.detach(), codes, counts, sums, recipe.decay, reset, generator
            )
        step += 1
        progress.log(
            "vq", step, total, loss=loss.item(), used_codes=float((counts > MIN_COUNT).sum())
        )
        if progress.save_is_due() or step in (recipe.plain_steps, recipe.codes_final, total):
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
    """Latents [B, I, e] of norm 1, before quantisation."""
    latents = vq.quant_conv(vq.encoder(pixels)).flatten(2).transpose(1, 2)
    return F.normalize(latents.float(), dim=-1)


def decode_latents(vq: VQModel, rows: Tensor) -> Tensor:
    """Pixels of latent rows [B, I, e]: `VQModel.decode` without the codebook lookup."""
    side = round(rows.shape[1] ** 0.5)
    return vq.decoder(vq.post_quant_conv(rows.transpose(1, 2).unflatten(2, (side, side))))


def straight_through(vq: VQModel, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Codebook rows with straight-through gradients to the latents, and the codes."""
    codes = vq.quantize(latents.detach())
    rows = vq.quantize.lookup(codes).detach()
    return latents + (rows - latents).detach(), codes


def pixel_loss(output: Tensor, pixels: Tensor) -> Tensor:
    """L1 plus squared error, with a weight of 1 to 4 per pixel that increases with its chroma."""
    chroma = (pixels.amax(1, keepdim=True) - pixels.amin(1, keepdim=True)) / 2
    error = output - pixels
    return ((1 + 3 * chroma) * (error.abs() + error.square())).mean()


@torch.no_grad()
def kmeans_codebook(vq: VQModel, images: NDArray[np.uint8], seed: int, rounds: int = 25) -> Tensor:
    """Codebook [K, e] of unit vectors by spherical k-means of the latents of `images`.

    Nearly equal latents count at most MAX_PER_CELL times; otherwise the backgrounds, which cover
    most of every image, would take all codes.
    """
    parts = [unit_latents(vq, to_pixels(images[i : i + 64])) for i in range(0, len(images), 64)]
    points = torch.cat(parts).flatten(0, 1)
    generator = torch.Generator().manual_seed(seed)
    points = points[torch.randperm(len(points), generator=generator)]
    _, cell = torch.unique((points * 5).round(), dim=0, return_inverse=True)
    cell_counts = torch.zeros(int(cell.max()) + 1)
    kept = []
    for index, number in enumerate(cell.tolist()):
        if cell_counts[number] < MAX_PER_CELL:
            cell_counts[number] += 1
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
def update_codebook(
    vq: VQModel,
    latents: Tensor,
    codes: Tensor,
    counts: Tensor,
    sums: Tensor,
    decay: float,
    reset: bool,
    generator: torch.Generator,
) -> None:
    """Move every code towards the mean of its latents, in place.

    `reset` also moves unused codes to latents that are far from their nearest code.
    """
    rows, flat = latents.flatten(0, 1), codes.flatten()
    used = flat.bincount(minlength=len(counts)).float()
    counts.mul_(decay).add_(used, alpha=1 - decay)
    sums.mul_(decay).add_(torch.zeros_like(sums).index_add_(0, flat, rows), alpha=1 - decay)
    if reset:
        unused = (counts < MIN_COUNT).nonzero().flatten()
        similarity = (rows * vq.quantize.lookup(flat)).sum(-1)
        worst = similarity.topk(min(len(unused) * 4, len(rows)), largest=False).indices
        chosen = worst[torch.randperm(len(worst), generator=generator)[: len(unused)]]
        sums[unused], counts[unused] = rows[chosen], 1.0
    vq.quantize.embedding.weight.data.copy_(F.normalize(sums, dim=-1))


@torch.no_grad()
def encode_all(vq: VQModel, images: NDArray[np.uint8]) -> Tensor:
    """Codes [N, 64] of uint8 images [N, 64, 64, 3]."""
    return torch.cat([vq.encode(to_pixels(images[i : i + 64])) for i in range(0, len(images), 64)])
