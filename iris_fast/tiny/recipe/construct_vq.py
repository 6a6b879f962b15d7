"""Stage A of pretraining: the VQ model, constructed so that it is lossless on the known tiles.

Every cell of an image of this world shows one of `world.tiles()`, so nothing has to be learned: the
weights are computed. In the following t [48] is a tile's pixels, row by row, in [-1, 1].

- Codebook: row k is (STRETCH * t_k, 1), used at unit length. Nearest in angle is nearest in pixels.
- Encoder: the strided convolutions move the 4 x 4 pixels of a cell into 48 channels.
- Pixel decoder: one code becomes 48 channels; each of the two upsampled levels keeps, at every
  place, the quarter of its cell's channels that belongs there (`_select_quarter`).

Two things stand between a sum of copies and a picture.

Group normalisation removes the level of a channel. Scalars therefore travel in groups of three
channels, (c + a, c - b, c - a + b), where c is a carrier: a pattern of places, the same in every
image and large. The group's mean is that of c whatever a and b are, its variance nearly so, and
a = first - mean of the three. Where c is very negative SiLU gives 0, where it is very positive SiLU
is the identity: a carrier that is positive in one quarter of every cell selects that quarter.

A convolution does not know where in a cell a place is. A ramp r that counts the columns from 1
does: once its grid is doubled, r - (r one place to the left) is 1 on the left half of every cell
and 0 on the right half, and r + (r one place to the left) is the ramp of the larger grid. The ramp
comes from the zero padding: k convolutions in a row count to k + 1.
"""

from __future__ import annotations

import itertools

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from iris_fast.models.vq import ResBlock, VQConfig, VQModel
from iris_fast.tiny.world import (
    CELL,
    NUM_CODES,
    SIDE,
    random_scenes,
    render_all,
    scene_codes,
    tiles,
)

VQ_CONFIG = VQConfig(
    codebook_size=NUM_CODES,
    codebook_dim=64,
    latent_channels=64,
    base_channels=96,
    channel_multiplier=(1, 1, 1),
    num_res_blocks=0,
)
SCALARS = 3 * CELL * CELL  # of a tile
LIFT = SCALARS  # the component of a row that is 1
STRETCH = 0.036  # the largest |STRETCH * t| is 0.25, which unit length shrinks by 3%
CARRIER = 6.0  # a carrier's size relative to the scalars, which are at most 1
SLOPE = 3.0  # of the SiLU's argument; its tails at SLOPE * (CARRIER - 2) are below 1e-4
GROUP = VQ_CONFIG.base_channels // 32  # channels that are normalised together: 3
RAMP_X, RAMP_Y = VQ_CONFIG.base_channels - 3, VQ_CONFIG.base_channels - 2  # in the last group
# The last two groups: a constant, the ramps, and copies of these.
CONSTANT = VQ_CONFIG.base_channels - 1
COPY_X, COPY_Y = RAMP_X - 3, RAMP_X - 2
RAMP_OFFSET = 12.0  # keeps SiLU in its linear part
LINEAR_OFFSET = CARRIER + 6.0  # likewise, for carriers of both signs
OUT = 72  # first channel of a level's result; the quarters take those before it
SAMPLE_SCENES, SAMPLE_SEED = 32, 0  # for the variances that normalisation divides by
# Quarters of a cell, (down, right), and the taps of a 3 x 3 kernel.
QUARTERS = tuple(itertools.product((0, 1), repeat=2))
HERE, ABOVE, LEFT = (1, 1), (0, 1), (1, 0)
RAMPS = ((RAMP_X, COPY_X, LEFT), (RAMP_Y, COPY_Y, ABOVE))


def construct_vq() -> VQModel:
    """The VQ model; float32 weights with bfloat16 values, so that saving does not change them."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        vq = VQModel(VQ_CONFIG)
        for parameter in vq.parameters():
            parameter.zero_()
        _construct_encoder(vq)
        _construct_codebook(vq)
        _construct_decoder(vq)
    return vq.eval().requires_grad_(False)


def tile_pixels() -> Tensor:
    """The tiles' pixels [2048, 48] in [-1, 1], by row, column, channel."""
    return torch.from_numpy(tiles().reshape(NUM_CODES, SCALARS).astype(np.float32)) / 127.5 - 1


def to_pixels(images: NDArray[np.uint8]) -> Tensor:
    """float32 [B, 3, H, W] in [-1, 1] of uint8 [B, H, W, 3]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1


@torch.no_grad()
def encode_all(vq: VQModel, images: NDArray[np.uint8]) -> Tensor:
    """Codes [N, 64] of uint8 images [N, 32, 32, 3]."""
    return torch.cat([vq.encode(to_pixels(images[i : i + 64])) for i in range(0, len(images), 64)])


def _put(target: Tensor, value: Tensor | float) -> None:
    """Write values rounded to bfloat16."""
    value = torch.as_tensor(value, dtype=torch.float32)
    target.copy_(value.to(torch.bfloat16).float())


def _scalar(row: int, column: int, channel: int, side: int = CELL) -> int:
    """Index of a pixel's channel in a block of side x side pixels."""
    return (row * side + column) * 3 + channel


def _members(pair: int, first_group: int = 0) -> list[int]:
    """The three channels of a group, which carry the scalars 2 * pair and 2 * pair + 1."""
    first = GROUP * (first_group + pair)
    return [first, first + 1, first + 2]


# How the members of a group depend on the two scalars, and the scalars on the members.
SPREAD = torch.tensor([[1.0, 0.0], [0.0, -1.0], [-1.0, 1.0]])
GATHER = torch.tensor([[2.0, -1.0, -1.0], [1.0, -2.0, 1.0]]) / 3


def _construct_encoder(vq: VQModel) -> None:
    """Pixels to latents (STRETCH * t, 1), by way of 12 and 48 channels and constants."""
    encoder = vq.encoder
    for channel in range(3):
        _put(encoder.conv_in.weight[channel, channel, 1, 1], 1.0)
    _put(encoder.conv_in.bias[CONSTANT], 1.0)
    first, second = (encoder.down[level].downsample.conv for level in (0, 1))
    for (down, right), channel in itertools.product(QUARTERS, range(3)):
        _put(first.weight[_scalar(down, right, channel, 2), channel, down, right], 1.0)
    _put(first.weight[CONSTANT, CONSTANT, 0, 0], 1.0)
    for (down, right), row, column, channel in itertools.product(
        QUARTERS, range(2), range(2), range(3)
    ):
        scalar = _scalar(2 * down + row, 2 * right + column, channel)
        source = _scalar(row, column, channel, 2)
        for member, share in zip(_members(scalar // 2), SPREAD[:, scalar % 2], strict=True):
            _put(second.weight[member, source, down, right], STRETCH * share)
    # The carrier is 0 in the last column, where the right tap meets the padding.
    _put(second.weight[: 3 * SCALARS // 2, CONSTANT, 0, 2], CARRIER)
    x = encoder.conv_in(to_pixels(render_all(random_scenes(SAMPLE_SCENES, SAMPLE_SEED))))
    x = encoder.down[1](encoder.down[0](x))
    _calibrate(encoder.norm_out, x, range(3 * SCALARS // 2), SLOPE, LINEAR_OFFSET)
    for scalar in range(SCALARS):
        for member, share in zip(_members(scalar // 2), GATHER[scalar % 2], strict=True):
            _put(encoder.conv_out.weight[scalar, member, 1, 1], share / SLOPE)
    _put(encoder.conv_out.bias[LIFT], 1.0)
    _put(vq.quant_conv.weight[:, :, 0, 0], torch.eye(VQ_CONFIG.codebook_dim))


def _construct_codebook(vq: VQModel) -> None:
    """Rows (STRETCH * t, 1)."""
    rows = torch.zeros(NUM_CODES, VQ_CONFIG.codebook_dim)
    rows[:, :SCALARS], rows[:, LIFT] = STRETCH * tile_pixels(), 1.0
    _put(vq.quantize.embedding.weight, rows)


def _construct_decoder(vq: VQModel) -> None:
    """Codes to pixels; the ramps on the way to 8 x 8, then two levels of selection."""
    decoder = vq.decoder
    codes = torch.from_numpy(scene_codes(random_scenes(SAMPLE_SCENES, SAMPLE_SEED)))
    rows = vq.quantize.lookup(codes)
    known = vq.quantize.lookup(torch.arange(NUM_CODES))
    # Unit length shrinks a row by up to 3%; the least squares make up for most of it.
    used = torch.cat([known[:, : SCALARS + 1], torch.ones(NUM_CODES, 1)], dim=1).double()
    normal = used.T @ used + 1e-6 * torch.eye(SCALARS + 2, dtype=torch.float64)
    solved = torch.linalg.solve(normal, used.T @ tile_pixels().double()).float()
    post = vq.post_quant_conv
    _put(post.weight[:SCALARS, : SCALARS + 1, 0, 0], solved[:-1].T)
    _put(post.bias[:SCALARS], solved[-1])
    _put(post.bias[LIFT], 1.0)
    for scalar in range(SCALARS):
        _put(decoder.conv_in.weight[scalar, scalar, 1, 1], 1.0)
    for ramp, _, before in RAMPS:
        _put(decoder.conv_in.weight[(ramp, LIFT, *before)], 1.0)
        _put(decoder.conv_in.weight[(ramp, LIFT, *HERE)], 1.0)
    x = decoder.conv_in(post(rows.transpose(1, 2).unflatten(2, (SIDE, SIDE))))
    for block in (decoder.mid.block_1, decoder.mid.block_2, decoder.up[0].block[0]):
        x = _count_on(block, x)
    for level, side in ((0, CELL), (1, CELL // 2)):
        x = _spread_quarters(decoder.up[level].upsample, x, side)
        x = _select_quarter(decoder.up[level + 1].block[0], x, side // 2)
    _calibrate(decoder.norm_out, x, range(OUT, OUT + GROUP * _groups(1)), SLOPE, LINEAR_OFFSET)
    for channel in range(3):
        members = _members(channel // 2, OUT // GROUP)
        for member, share in zip(members, GATHER[channel % 2], strict=True):
            _put(decoder.conv_out.weight[channel, member, 1, 1], share / SLOPE)


def _calibrate(
    norm: nn.GroupNorm, x: Tensor, channels: range | list[int], slope: float, offset: float
) -> None:
    """Let the norm map these channels v to slope * (v + offset), for activations x like these."""
    grouped = x.unflatten(1, (32, GROUP))
    means = grouped.mean((2, 3, 4)).mean(0).repeat_interleave(GROUP)
    variances = grouped.var((2, 3, 4), correction=0).mean(0).repeat_interleave(GROUP)
    for channel in channels:
        _put(norm.weight[channel], slope * (variances[channel] + norm.eps).sqrt())
        _put(norm.bias[channel], slope * (means[channel] + offset))


def _count_on(block: ResBlock, x: Tensor) -> Tensor:
    """Let a block add two steps to both ramps: min(place, k) becomes min(place, k + 2)."""
    for norm in (block.norm1, block.norm2):
        _put(norm.bias[CONSTANT], RAMP_OFFSET)
    _calibrate(block.norm1, x, [RAMP_X, RAMP_Y], 1.0, RAMP_OFFSET)
    for ramp, copy, before in RAMPS:
        # SiLU's argument has an offset, which the padding lacks, as it lacks the constant channel.
        _step(block.conv1, ramp, before)
        _put(block.conv1.weight[(copy, ramp, *HERE)], 1.0)
        _put(block.conv1.weight[(copy, CONSTANT, *HERE)], -1.0)
    inner = block.conv1(F.silu(block.norm1(x)))
    _calibrate(block.norm2, inner, [RAMP_X, RAMP_Y, COPY_X, COPY_Y], 1.0, RAMP_OFFSET)
    for ramp, copy, before in RAMPS:
        _step(block.conv2, ramp, before)
        # The block adds its input, the ramp before both steps.
        _put(block.conv2.weight[(ramp, copy, *HERE)], -1.0)
        _put(block.conv2.weight[(ramp, CONSTANT, *HERE)], 1.0)
    return block(x)


def _step(conv: nn.Conv2d, ramp: int, before: tuple[int, int]) -> None:
    """A ramp's next value: that of the place before, plus 1."""
    _put(conv.weight[(ramp, ramp, *before)], 1.0)
    _put(conv.weight[(ramp, CONSTANT, *before)], -1.0)
    _put(conv.bias[ramp], 1.0)


def _spread_quarters(upsample: nn.Sequential, x: Tensor, side: int) -> Tensor:
    """Double the grid; give every quarter of a block of side x side pixels groups of its own.

    A quarter's carrier is CARRIER in its place, and -CARRIER or less in the three others.
    """
    conv, half = upsample.conv, side // 2
    first_source = 0 if side == CELL else OUT
    for number, (down, right) in enumerate(QUARTERS):
        first_group = number * _groups(half)
        for row, column, channel in itertools.product(range(half), range(half), range(3)):
            scalar = _scalar(row, column, channel, half)
            source = first_source + _scalar(down * half + row, right * half + column, channel, side)
            members = _members(scalar // 2, first_group)
            for member, share in zip(members, SPREAD[:, scalar % 2], strict=True):
                _put(conv.weight[(member, source, *HERE)], share)
        for group in range(_groups(half)):
            for member in _members(group, first_group):
                bias = -CARRIER
                for (ramp, _, before), second in zip(RAMPS, (right, down), strict=True):
                    sign = CARRIER if second == 0 else -CARRIER
                    _put(conv.weight[(member, ramp, *HERE)], 2 * sign)
                    _put(conv.weight[(member, ramp, *before)], -2 * sign)
                    bias -= sign
                _put(conv.bias[member], bias)
    for ramp, _, before in RAMPS:
        _put(conv.weight[(ramp, ramp, *HERE)], 1.0)
        _put(conv.weight[(ramp, ramp, *before)], 1.0)
    return upsample(x)


def _select_quarter(block: ResBlock, x: Tensor, side: int) -> Tensor:
    """Keep the quarter that belongs at a place: its block of side x side pixels, from OUT on.

    A single pixel is kept in groups with a carrier, for the last normalisation.
    """
    groups = _groups(side)
    selected = range(len(QUARTERS) * groups * GROUP)
    _calibrate(block.norm1, x, selected, SLOPE, 0.0)
    for number, (_, right) in enumerate(QUARTERS):
        for group in range(groups):
            sources = _members(group, number * groups)
            for member, shares in zip(_members(group), SPREAD @ GATHER / SLOPE, strict=True):
                for source, share in zip(sources, shares, strict=True):
                    _put(block.conv1.weight[(member, source, *HERE)], share)
                # The new carrier is CARRIER on the left half of a block, -CARRIER on the right.
                for source in _members(0, number * groups) if right == 0 else ():
                    weight = block.conv1.weight[(member, source, *HERE)]
                    _put(weight, weight + 2 / (GROUP * SLOPE))
                _put(block.conv1.bias[member], -CARRIER)
    inner = block.conv1(F.silu(block.norm1(x)))
    _calibrate(block.norm2, inner, range(groups * GROUP), SLOPE, LINEAR_OFFSET)
    for group in range(groups):
        if side > 1:
            targets, shares = [OUT + 2 * group, OUT + 2 * group + 1], GATHER / SLOPE
        else:
            targets, shares = _members(group, OUT // GROUP), SPREAD @ GATHER / SLOPE
        for target, row in zip(targets, shares, strict=True):
            for source, share in zip(_members(group), row, strict=True):
                _put(block.conv2.weight[(target, source, *HERE)], share)
            if side == 1:
                for source in _members(0):
                    weight = block.conv2.weight[(target, source, *HERE)]
                    _put(weight, weight + 1 / (GROUP * SLOPE))
                _put(block.conv2.bias[target], -LINEAR_OFFSET)
    return block(x)


def _groups(side: int) -> int:
    """Groups that carry a block of side x side pixels, two scalars each."""
    return (3 * side * side + 1) // 2
