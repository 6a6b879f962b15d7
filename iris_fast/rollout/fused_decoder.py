"""A decoding step of few launches: `Decoder.forward` for one new token a sequence, fused.

A layer is nine launches, four of them matrix products, where its modules take over forty; at the
sizes of one token a sequence it is launches that the time goes into. The arithmetic and its
roundings are those of the modules.

With `weight_dtype="fp8"` the products read float8_e4m3fn copies of their weights, scaled by output
channel, and get their inputs in 8 bits too, scaled by row: half the weights' traffic, and other
logits.

Shapes: B sequences, D hidden width, H query heads, J key/value heads, I MLP width, d head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from iris_kernels import add_rms_norm, quantize_rows, silu_mul
from torch import Tensor, nn
from torch.nn.functional import ScalingType, scaled_mm

from iris_fast.models.decoder import Decoder, DecoderLayer, RMSNorm
from iris_fast.rollout.shared_cache import SharedKVCache


def lay_side_by_side(parameters: list[nn.Parameter]) -> Tensor:
    """Move parameters into one allocation, of which they become views, and return it.

    Where they lie so already nothing moves: what was laid out before stays right.
    """
    first, size = parameters[0].detach(), sum(len(p) for p in parameters)
    offsets = [first.storage_offset()]
    for parameter in parameters[:-1]:
        offsets.append(offsets[-1] + parameter.numel())
    if all(
        p.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        and p.storage_offset() == offset
        and p.is_contiguous()
        for p, offset in zip(parameters, offsets, strict=True)
    ):
        return first.as_strided((size, *first.shape[1:]), first.stride())
    together = torch.cat([parameter.detach() for parameter in parameters])
    parts = together.split([len(parameter) for parameter in parameters])
    for parameter, part in zip(parameters, parts, strict=True):
        parameter.data = part
    return together


class Product:
    """Linear layers that take the same input, as one matrix product, for frozen weights.

    The layers stay what they are, and weights written to them in place are seen here.
    """

    def __init__(self, *layers: nn.Linear, weight_dtype: str = "auto") -> None:
        """The layers' outputs follow one another in the product's."""
        self._layers = layers
        self.sizes = [layer.out_features for layer in layers]
        self._eight_bits, self._quantized = weight_dtype == "fp8", None
        if self._eight_bits and (sum(self.sizes) % 16 or layers[0].in_features % 16):
            raise ValueError(
                "weight_dtype: fp8 products take sizes that 16 divides, these layers have "
                f"{(sum(self.sizes), layers[0].in_features)}: use auto"
            )
        self.refresh()

    def refresh(self) -> None:
        """Take over the layers' weights: where they were replaced since, laid out again; where they
        are kept in 8 bits, those written anew."""
        self._weight = lay_side_by_side([layer.weight for layer in self._layers])
        biased = self._layers[0].bias is not None
        self._bias = lay_side_by_side([layer.bias for layer in self._layers]) if biased else None
        if not self._eight_bits:
            return
        quantized = quantize_rows(self._weight)
        if self._quantized is None or self._quantized.values.device != self._weight.device:
            self._quantized = quantized
        for kept, new in zip(self._quantized, quantized, strict=True):
            kept.copy_(new)

    def __call__(self, x_BD: Tensor) -> Tensor:
        """[B, all outputs] of [B, inputs], contiguous."""
        if self._quantized is None:
            return F.linear(x_BD, self._weight, self._bias)
        weight, rows = self._quantized, quantize_rows(x_BD)
        by_row = ScalingType.RowWise
        return scaled_mm(
            rows.values, weight.values.t(), rows.scales, by_row, weight.scales.t(), by_row,
            bias=self._bias, output_dtype=x_BD.dtype,
        )  # fmt: skip


class FusedLayer:
    """A block of the decoder, with four products instead of seven."""

    def __init__(self, layer: DecoderLayer, weight_dtype: str) -> None:
        """Over the weights of `layer`."""
        attention, mlp = layer.self_attn, layer.mlp
        self.layer = layer
        self.qkv = Product(
            attention.q_proj, attention.k_proj, attention.v_proj, weight_dtype=weight_dtype
        )
        self.out = Product(attention.o_proj, weight_dtype=weight_dtype)
        self.gate_up = Product(mlp.gate_proj, mlp.up_proj, weight_dtype=weight_dtype)
        self.down = Product(mlp.down_proj, weight_dtype=weight_dtype)


class FusedDecoder:
    """A decoder with frozen weights, fused; see the top of the file. It holds the weights of the
    decoder it is made of, not a copy, apart from those in 8 bits."""

    def __init__(self, decoder: Decoder, weight_dtype: str = "auto") -> None:
        """`weight_dtype`: auto is the weights' own; fp8."""
        self._decoder = decoder
        self._layers = [FusedLayer(layer, weight_dtype) for layer in decoder.layers]

    def refresh(self) -> None:
        """Take over weights that were written to the decoder, or replaced, since the last call;
        those written in place and not kept in 8 bits are seen without."""
        for layer in self._layers:
            for product in (layer.qkv, layer.out, layer.gate_up, layer.down):
                product.refresh()

    def step(self, embeds_BD: Tensor, cache: SharedKVCache) -> Tensor:
        """Final-norm hidden rows [B, D] of the next token of every sequence; the cache keeps and
        counts it. Neither waits for the device nor counts on the host."""
        config, stream_BD, rope = self._decoder.config, embeds_BD.clone(), cache.rope()

        def add_norm(norm: RMSNorm, delta_BD: Tensor | None) -> Tensor:
            return add_rms_norm(stream_BD, norm.weight, eps=norm.eps, delta=delta_BD)

        delta_BD = None
        for index, fused in enumerate(self._layers):
            normed_BD = add_norm(fused.layer.input_layernorm, delta_BD)
            parts = fused.qkv(normed_BD).split(fused.qkv.sizes, dim=-1)
            query, key, value = (part.unflatten(-1, (-1, config.head_dim)) for part in parts)
            context_BHd = cache.append_and_attend(index, query, key, value, rope)
            delta_BD = fused.out(context_BHd.flatten(-2))
            normed_BD = add_norm(fused.layer.post_attention_layernorm, delta_BD)
            delta_BD = fused.down(silu_mul(fused.gate_up(normed_BD)))
        cache.advance()
        return add_norm(self._decoder.norm, delta_BD)
