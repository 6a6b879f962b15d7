"""A decoding step of few kernel launches: `Decoder.forward` for one new token per sequence, fused.

A layer takes eight launches, four of them matrix products, where its modules take over forty; with
one token per sequence, launches dominate the time. For few sequences on a GPU the products are
`decode_linear`'s, which apply the gate and leave partial sums to the next norm: seven launches
(eight where attention is split). On a CPU the same calls are functions in C++. Arithmetic and
rounding are those of the modules.

With `weight_dtype="fp8"` the products read float8_e4m3fn copies of their weights, scaled per output
channel, and quantize their inputs as well, scaled per row: half the traffic of the weights, and
slightly different logits.

Shapes: B sequences, D hidden width, H query heads, J key/value heads, I MLP width, d head width.
"""

import functools

import torch
import torch.nn.functional as F
from iris_kernels import (
    add_rms_norm,
    decode_linear,
    decode_linear_partials,
    quantize_rows,
    silu_mul,
    uses_triton,
)
from torch import Tensor, nn
from torch.nn.functional import ScalingType, scaled_mm

from iris_fast.models.decoder import Decoder, DecoderLayer, RMSNorm
from iris_fast.models.janus import GenerationHead
from iris_fast.rollout.shared_cache import SharedKVCache

FP8_MULTIPLE = 16  # of the sizes that `scaled_mm` takes
# Up to here `decode_linear` is used, above it torch's products. At 128 rows the step is modelled to
# be 3% faster with it (bench/trainer/step_model.py); to be decided by
# bench/kernels/decode_linear.py on a GPU.
FEW_ROWS = 128
FEW_ROWS_MULTIPLE = 16  # of K, or `decode_linear` loads elements one by one


def fuse_storage(parameters: list[nn.Parameter], by_input: bool = False) -> Tensor:
    """Move parameters into one allocation, of which they become views, and return it.

    `by_input`: weights [outputs, inputs] are stored as [inputs, outputs]. Parameters that already
    follow one another in memory are not moved, so that earlier results of this function stay valid.
    """
    first, lengths = parameters[0].detach(), [len(parameter) for parameter in parameters]
    shape = (sum(lengths), *first.shape[1:])
    strides = first.stride() if by_input else torch.empty(shape, device="meta").stride()
    storage, offset = first.untyped_storage().data_ptr(), first.storage_offset()
    fused = not by_input or strides[0] == 1
    for parameter in parameters:
        fused &= parameter.untyped_storage().data_ptr() == storage
        fused &= parameter.storage_offset() == offset and parameter.stride() == strides
        offset += len(parameter) * strides[0]
    if not fused:
        copied = torch.cat([parameter.detach() for parameter in parameters])
        if by_input:
            copied = copied.t().contiguous().t()
        for parameter, part in zip(parameters, copied.split(lengths), strict=True):
            parameter.data = part
        return copied
    return first.as_strided(shape, strides)


def few_rows_fit(x_BD: Tensor, *widths: int) -> bool:
    """Whether `decode_linear` is used for products of such inputs with K of these widths."""
    narrow = x_BD.dtype in (torch.bfloat16, torch.float16)
    aligned = not any(width % FEW_ROWS_MULTIPLE for width in widths)
    return narrow and aligned and len(x_BD) <= FEW_ROWS and uses_triton(x_BD)


def image_logits(head: GenerationHead, hidden_BD: Tensor) -> Tensor:
    """Logits [B, K] by `head` of final-norm hidden rows; of few rows two launches."""
    first, last = head.proj_out, head.vision_head
    if not few_rows_fit(hidden_BD, first.in_features, last.in_features):
        return head(hidden_BD)
    hidden_BD = decode_linear(hidden_BD, first.weight, first.bias, gelu=True)
    return decode_linear(hidden_BD, last.weight, last.bias)


class FusedLinear:
    """Linear layers with the same input and frozen weights, as one matrix product.

    Their outputs are concatenated. The layers stay usable, and weights written to them in place are
    used here. `weight_dtype`: auto is that of the layers; fp8, with sizes that 16 divides.
    """

    def __init__(self, *layers: nn.Linear, weight_dtype: str = "auto") -> None:
        self._layers = layers
        self._fp8, self._quantized = weight_dtype == "fp8", None
        sizes = sum(layer.out_features for layer in layers), layers[0].in_features
        if self._fp8 and any(size % FP8_MULTIPLE for size in sizes):
            raise ValueError(
                f"weight_dtype: fp8 needs sizes that {FP8_MULTIPLE} divides, these layers have "
                f"{sizes}; use auto"
            )
        self.refresh()

    def refresh(self) -> None:
        """Use the layers' current weights: fuse those that were replaced, quantize them for fp8."""
        # MKL multiplies few rows faster by weights that are stored by input channel.
        weight = self._layers[0].weight
        by_input = weight.is_cpu and not self._fp8 and not uses_triton(weight)
        self._weight = fuse_storage([layer.weight for layer in self._layers], by_input)
        biased = self._layers[0].bias is not None
        self._bias = fuse_storage([layer.bias for layer in self._layers]) if biased else None
        if not self._fp8:
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
        per_row = ScalingType.RowWise
        return scaled_mm(
            rows.values, weight.values.t(), rows.scales, per_row, weight.scales.t(), per_row,
            bias=self._bias, output_dtype=x_BD.dtype,
        )  # fmt: skip

    @property
    def few_rows_width(self) -> int | None:
        """K of the product by `few_rows` and the like; None: fp8, which they do not take."""
        return None if self._fp8 else self._layers[0].in_features

    @property
    def weight(self) -> Tensor:
        """[All outputs, inputs], in the layers' dtype."""
        return self._weight

    def few_rows(self, x_BD: Tensor) -> Tensor:
        """The same product by `decode_linear`."""
        return decode_linear(x_BD, self._weight, self._bias)

    def gated(self, x_BD: Tensor) -> Tensor:
        """silu of the first half of the product times its second half."""
        return decode_linear(x_BD, self._weight, gated=True)

    def partials(self, x_BD: Tensor) -> Tensor:
        """fp32 partial sums of the product, which `add_rms_norm` takes."""
        return decode_linear_partials(x_BD, self._weight)


class FusedLayer:
    """A block of the decoder, with four products instead of seven."""

    def __init__(self, layer: DecoderLayer, weight_dtype: str) -> None:
        self.layer, attention, mlp = layer, layer.self_attn, layer.mlp
        linear = functools.partial(FusedLinear, weight_dtype=weight_dtype)
        self.qkv = linear(attention.q_proj, attention.k_proj, attention.v_proj)
        self.out = linear(attention.o_proj)
        self.gate_up = linear(mlp.gate_proj, mlp.up_proj)
        self.down = linear(mlp.down_proj)

    def takes_few_rows(self, x_BD: Tensor) -> bool:
        """Whether `decode_linear` runs the four products for inputs of this dtype and length."""
        products = (self.qkv, self.out, self.gate_up, self.down)
        widths = [product.few_rows_width for product in products]
        return None not in widths and few_rows_fit(x_BD, *widths)

    def project(self, x_BD: Tensor, few: bool) -> Tensor:
        """Query, key and value, concatenated."""
        return self.qkv.few_rows(x_BD) if few else self.qkv(x_BD)

    def attention_output(self, context_BD: Tensor, few: bool) -> Tensor:
        """What attention adds to the residual stream; of few rows partial sums."""
        return self.out.partials(context_BD) if few else self.out(context_BD)

    def mlp_output(self, x_BD: Tensor, few: bool) -> Tensor:
        """What the MLP adds to the residual stream; of few rows partial sums."""
        if few:
            return self.down.partials(self.gate_up.gated(x_BD))
        return self.down(silu_mul(self.gate_up(x_BD)))


class FusedDecoder:
    """A decoder with frozen weights, fused as the module docstring describes.

    It shares the weights of `decoder`; only fp8 weights are copies. `weight_dtype`: auto is that of
    the decoder; fp8.
    """

    def __init__(self, decoder: Decoder, weight_dtype: str = "auto") -> None:
        self._decoder = decoder
        self._layers = [FusedLayer(layer, weight_dtype) for layer in decoder.layers]

    def refresh(self) -> None:
        """Use the decoder's current weights. Not needed after writes in place, except with fp8."""
        for layer in self._layers:
            for linear in (layer.qkv, layer.out, layer.gate_up, layer.down):
                linear.refresh()

    def step(self, embeds_BD: Tensor, cache: SharedKVCache) -> Tensor:
        """Final-norm hidden states [B, D] of the next token of every sequence, which the cache then
        holds. Overwrites `embeds_BD`. On a GPU it neither synchronises with the device nor depends
        on host state."""
        config, stream_BD, rows = self._decoder.config, embeds_BD, len(embeds_BD)
        heads = [config.num_heads, config.num_kv_heads, config.num_kv_heads]

        def add_norm(
            norm: RMSNorm, delta: Tensor | None, then: FusedLinear | None = None
        ) -> Tensor:
            ahead = then.weight if few and then is not None else None
            return add_rms_norm(stream_BD, norm.weight, eps=norm.eps, delta=delta, ahead=ahead)

        few, delta = self._layers[0].takes_few_rows(embeds_BD), None
        for index, fused in enumerate(self._layers):
            normed_BD = add_norm(fused.layer.input_layernorm, delta, fused.qkv)
            projected = fused.project(normed_BD, few).view(rows, -1, config.head_dim)
            new = projected.split_with_sizes(heads, dim=1)
            context_BHd = cache.append_and_attend(index, *new)
            delta = fused.attention_output(context_BHd.view(rows, -1), few)
            normed_BD = add_norm(fused.layer.post_attention_layernorm, delta, fused.gate_up)
            delta = fused.mlp_output(normed_BD, few)
        hidden_BD = add_norm(self._decoder.norm, delta)  # next to the kernel that it overlaps with
        cache.advance()
        return hidden_BD
