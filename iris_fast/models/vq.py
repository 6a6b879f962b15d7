"""The VQ autoencoder of Janus: image codes to pixels and back.

Parameter names are those of transformers' JanusVQVAE. Widths per level are
`base_channels * channel_multiplier[level]`, level 0 at full resolution; every level but the last
halves the resolution, so a code covers 2^(levels - 1) pixels along each side.

Shapes: B images, I codes (row-major over the grid), z latent channels, e codebook width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class VQConfig:
    """Sizes of the VQ; the defaults are Janus-Pro's."""

    codebook_size: int = 16384
    codebook_dim: int = 8
    latent_channels: int = 256
    base_channels: int = 128
    channel_multiplier: tuple[int, ...] = (1, 1, 2, 2, 4)
    num_res_blocks: int = 2

    @property
    def patch_size(self) -> int:
        """Pixels along the side of what one code covers."""
        return 2 ** (len(self.channel_multiplier) - 1)

    @property
    def widths(self) -> list[int]:
        """Channels of every level, full resolution first."""
        return [self.base_channels * multiplier for multiplier in self.channel_multiplier]


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(num_groups=32, num_channels=channels, eps=1e-6)


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), the skip a 1x1 convolution if widths differ."""

    def __init__(self, width_in: int, width_out: int) -> None:
        """[B, width_in, h, w] -> [B, width_out, h, w]."""
        super().__init__()
        self.norm1 = _norm(width_in)
        self.conv1 = nn.Conv2d(width_in, width_out, 3, padding=1)
        self.norm2 = _norm(width_out)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1)
        if width_in != width_out:
            self.nin_shortcut = nn.Conv2d(width_in, width_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Same height and width."""
        skip = self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x
        x = self.conv1(F.silu(self.norm1(x)))
        return skip + self.conv2(F.silu(self.norm2(x)))


class AttentionBlock(nn.Module):
    """Single-head self-attention over all pixels, added to its input."""

    def __init__(self, width: int) -> None:
        """q, k, v and the output projection are 1x1 convolutions."""
        super().__init__()
        self.norm = _norm(width)
        self.q = nn.Conv2d(width, width, 1)
        self.k = nn.Conv2d(width, width, 1)
        self.v = nn.Conv2d(width, width, 1)
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        normed = self.norm(x)
        query, key, value = (
            project(normed).flatten(2).transpose(1, 2)[:, None]
            for project in (self.q, self.k, self.v)
        )
        context = F.scaled_dot_product_attention(query, key, value)[:, 0]
        return x + self.proj_out(context.transpose(1, 2).unflatten(2, x.shape[2:]))


class Downsample(nn.Module):
    """3x3 convolution of stride 2; one pixel of zeros at the right and at the bottom."""

    def __init__(self, width: int) -> None:
        """[B, width, h, w] -> [B, width, h/2, w/2]."""
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Half the height and width."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest neighbour, then a 3x3 convolution."""

    def __init__(self, width: int) -> None:
        """[B, width, h, w] -> [B, width, 2h, 2w]."""
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Twice the height and width."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class MidBlock(nn.Module):
    """Res block, attention, res block at the lowest resolution."""

    def __init__(self, width: int) -> None:
        """Keeps width and size."""
        super().__init__()
        self.block_1 = ResBlock(width, width)
        self.attn_1 = AttentionBlock(width)
        self.block_2 = ResBlock(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        return self.block_2(self.attn_1(self.block_1(x)))


class Level(nn.Module):
    """The res blocks of one resolution, an attention after each at the lowest."""

    def __init__(self, width_in: int, width_out: int, blocks: int, attention: bool) -> None:
        """`downsample` or `upsample` is attached by the encoder or the decoder."""
        super().__init__()
        widths = [width_in] + [width_out] * blocks
        self.block = nn.ModuleList(ResBlock(widths[j], widths[j + 1]) for j in range(blocks))
        count = blocks if attention else 0
        self.attn = nn.ModuleList(AttentionBlock(width_out) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        """Res blocks and attentions, then the resampling if there is one."""
        for j, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[j](x)
        for name in ("downsample", "upsample"):
            if hasattr(self, name):
                x = getattr(self, name)(x)
        return x


class Encoder(nn.Module):
    """Pixels to latents."""

    def __init__(self, config: VQConfig) -> None:
        """[B, 3, H, W] -> [B, z, H/patch, W/patch]."""
        super().__init__()
        widths, last = config.widths, len(config.widths) - 1
        self.conv_in = nn.Conv2d(3, config.base_channels, 3, padding=1)
        self.down = nn.ModuleList()
        for i, width in enumerate(widths):
            before = widths[i - 1] if i else config.base_channels
            level = Level(before, width, config.num_res_blocks, attention=i == last)
            if i != last:
                level.downsample = Downsample(width)
            self.down.append(level)
        self.mid = MidBlock(widths[-1])
        self.norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.latent_channels, 3, padding=1)

    def forward(self, pixels: Tensor) -> Tensor:
        """Latents."""
        x = self.conv_in(pixels)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class PixelDecoder(nn.Module):
    """Latents to pixels. `up.0` is the lowest resolution: the checkpoint's own order."""

    def __init__(self, config: VQConfig) -> None:
        """[B, z, h, w] -> [B, 3, h * patch, w * patch]."""
        super().__init__()
        widths = config.widths[::-1]
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid = MidBlock(widths[0])
        self.up = nn.ModuleList()
        for i, width in enumerate(widths):
            before = widths[max(i - 1, 0)]
            level = Level(before, width, config.num_res_blocks + 1, attention=i == 0)
            if i != len(widths) - 1:
                level.upsample = Upsample(width)
            self.up.append(level)
        self.norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        """Pixels."""
        x = self.mid(self.conv_in(latents))
        for level in self.up:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Quantizer(nn.Module):
    """The codebook. Its rows are used L2-normalised, whatever their stored length."""

    def __init__(self, config: VQConfig) -> None:
        """`embedding` [K, e]."""
        super().__init__()
        self.embedding = nn.Embedding(config.codebook_size, config.codebook_dim)

    def forward(self, latents: Tensor) -> Tensor:
        """Codes [...] of the nearest row for latents [..., e], both normalised.

        |a - b|^2 = 2 - 2 a.b for unit vectors: nearest is the largest inner product.
        """
        codebook = F.normalize(self.embedding.weight, dim=-1)
        return (F.normalize(latents, dim=-1) @ codebook.T).argmax(-1)

    def lookup(self, codes: Tensor) -> Tensor:
        """Unit rows [..., e] of codes [...]."""
        return F.normalize(self.embedding(codes), dim=-1)


class VQModel(nn.Module):
    """The whole autoencoder; frozen wherever it is loaded."""

    def __init__(self, config: VQConfig) -> None:
        """Random weights; `iris_fast.models.pretrained.load.load_janus` opens a checkpoint."""
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = PixelDecoder(config)
        self.quantize = Quantizer(config)
        self.quant_conv = nn.Conv2d(config.latent_channels, config.codebook_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.codebook_dim, config.latent_channels, 1)

    def decode(self, codes: Tensor) -> Tensor:
        """Pixels [B, 3, H, W], nominally in [-1, 1], of codes [B, I] of a square grid.

        ValueError if I is no square.
        """
        side = round(codes.shape[-1] ** 0.5)
        if codes.dim() != 2 or side * side != codes.shape[-1]:
            raise ValueError(f"codes must be [B, side * side], got {list(codes.shape)}")
        grid = self.quantize.lookup(codes).transpose(1, 2).unflatten(2, (side, side))
        return self.decoder(self.post_quant_conv(grid))

    def encode(self, pixels: Tensor) -> Tensor:
        """Codes [B, I] (int64) of pixels [B, 3, H, W] in [-1, 1]; H, W multiples of the patch."""
        latents = self.quant_conv(self.encoder(pixels))
        return self.quantize(latents.flatten(2).transpose(1, 2))


def to_uint8(pixels: Tensor) -> Tensor:
    """uint8 images [B, H, W, 3] of pixels [B, 3, H, W]: (x + 1) / 2 * 255, clipped, truncated."""
    scaled = (pixels.float() + 1) / 2 * 255
    return scaled.clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
