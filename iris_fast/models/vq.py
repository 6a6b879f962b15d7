"""The VQ autoencoder of Janus: image codes to pixels and back.

Parameter names are those of transformers' JanusVQVAE. Widths per level are
`base_channels * channel_multiplier[level]`, level 0 at full resolution; every level but the last
halves the resolution, so a code covers 2^(levels - 1) pixels along each side.

Shapes: B images, I codes (row-major over the grid), z latent channels, e codebook width.
"""

from collections import OrderedDict
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
        """Side of the square that one code covers, in pixels."""
        return 2 ** (len(self.channel_multiplier) - 1)

    @property
    def widths(self) -> list[int]:
        """Channels of every level, full resolution first."""
        return [self.base_channels * multiplier for multiplier in self.channel_multiplier]


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(num_groups=32, num_channels=channels, eps=1e-6)


class ResBlock(nn.Module):
    """skip(x) + conv(silu(norm(conv(silu(norm(x)))))); skip is a 1x1 conv where widths differ."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.norm1 = _norm(width_in)
        self.conv1 = nn.Conv2d(width_in, width_out, 3, padding=1)
        self.norm2 = _norm(width_out)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1)
        same = width_in == width_out
        self.nin_shortcut = nn.Identity() if same else nn.Conv2d(width_in, width_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Same height and width."""
        inner = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(F.silu(self.norm2(inner)))


class AttentionBlock(nn.Module):
    """Single-head self-attention over all pixels, added to its input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = _norm(width)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        normed = self.norm(x)
        projected = (project(normed) for project in (self.q, self.k, self.v))
        qkv = (y.flatten(2).transpose(1, 2)[:, None] for y in projected)
        context = F.scaled_dot_product_attention(*qkv)[:, 0]
        return x + self.proj_out(context.transpose(1, 2).unflatten(2, x.shape[2:]))


def _downsample(width: int) -> nn.Sequential:
    """Half the height and width: pad with zeros on the right and at the bottom, convolve."""
    conv = nn.Conv2d(width, width, 3, stride=2)
    return nn.Sequential(OrderedDict(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=conv))


def _upsample(width: int) -> nn.Sequential:
    """Twice the height and width: nearest neighbour, then a convolution."""
    conv = nn.Conv2d(width, width, 3, padding=1)
    return nn.Sequential(OrderedDict(nearest=nn.Upsample(scale_factor=2.0), conv=conv))


def _mid(width: int) -> nn.Sequential:
    """Res block, attention, res block at the lowest resolution."""
    blocks = ResBlock(width, width), AttentionBlock(width), ResBlock(width, width)
    return nn.Sequential(OrderedDict(zip(("block_1", "attn_1", "block_2"), blocks, strict=True)))


class Level(nn.Module):
    """The res blocks of one resolution, each followed by attention at the lowest one.

    The encoder or the decoder adds `downsample` or `upsample`.
    """

    def __init__(self, width_in: int, width_out: int, blocks: int, attention: bool) -> None:
        super().__init__()
        widths = [width_in] + [width_out] * blocks
        self.block = nn.ModuleList(ResBlock(widths[j], widths[j + 1]) for j in range(blocks))
        count = blocks if attention else 0
        self.attn = nn.ModuleList(AttentionBlock(width_out) for _ in range(count))
        self.downsample = self.upsample = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Res blocks and attention, then the resampling if this level has any."""
        for j, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[j](x)
        return self.upsample(self.downsample(x))


class Encoder(nn.Module):
    """Pixels [B, 3, H, W] to latents [B, z, H / patch, W / patch]."""

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        widths, last = config.widths, len(config.widths) - 1
        self.conv_in = nn.Conv2d(3, config.base_channels, 3, padding=1)
        self.down = nn.ModuleList()
        for i, width in enumerate(widths):
            before = widths[i - 1] if i else config.base_channels
            self.down.append(Level(before, width, config.num_res_blocks, attention=i == last))
            if i != last:
                self.down[i].downsample = _downsample(width)
        self.mid = _mid(widths[-1])
        self.norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.latent_channels, 3, padding=1)

    def forward(self, pixels: Tensor) -> Tensor:
        """Latents."""
        x = self.conv_in(pixels)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class PixelDecoder(nn.Module):
    """Latents [B, z, h, w] to pixels [B, 3, h * patch, w * patch].

    `up.0` is the lowest resolution, as in the published weights.
    """

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        widths = config.widths[::-1]
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid = _mid(widths[0])
        self.up = nn.ModuleList()
        for i, width in enumerate(widths):
            before = widths[max(i - 1, 0)]
            self.up.append(Level(before, width, config.num_res_blocks + 1, attention=i == 0))
            if i != len(widths) - 1:
                self.up[i].upsample = _upsample(width)
        self.norm_out = _norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        """Pixels."""
        x = self.mid(self.conv_in(latents))
        for level in self.up:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Quantizer(nn.Module):
    """The codebook [K, e]. Its rows are used L2-normalised, whatever their stored length."""

    def __init__(self, config: VQConfig) -> None:
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
    """The autoencoder, with random weights; `models.pretrained.load.load_janus` opens trained ones.

    It is frozen wherever it is loaded.
    """

    def __init__(self, config: VQConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = PixelDecoder(config)
        self.quantize = Quantizer(config)
        self.quant_conv = nn.Conv2d(config.latent_channels, config.codebook_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.codebook_dim, config.latent_channels, 1)

    def decode(self, codes: Tensor) -> Tensor:
        """Pixels [B, 3, H, W], about [-1, 1], of codes [B, I]; ValueError if I is not a square."""
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
