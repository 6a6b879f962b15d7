"""The Llama-style decoder, written once, for training and for decoding.

It works on token rows without padding: every row is a real token with its own position. Which rows
attend to which is decided by the attention strategy that the caller passes in
(`iris_fast.models.attention`), so a packed training batch and one step of cached decoding run the
same code. Parameter names are those of transformers' LlamaModel.

On a GPU what lies between the matrix products runs in the differentiable kernels of `iris_kernels`,
which round as the modules do and move a sixth of their bytes (`bench/trainer/counted_work.py`).
`--torch_compile true` leaves that fusion to the compiler instead.

Shapes: T token rows, D hidden width, H query heads, J key/value heads, d head width.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from iris_kernels import backend, residual_rms_norm, rope, silu_mul
from torch import Tensor, nn

from iris_fast.models.joined_linear import joined_linear

# attention(layer_index, query_THd, key_TJd, value_TJd) -> context_THd
AttentionStrategy = Callable[[int, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of a decoder."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    qkv_bias: bool = False
    max_positions: int = 16384


def runs_fused(x: Tensor) -> bool:
    """Whether blocks run `iris_kernels` between their products: on a GPU, and on a CPU in C++,
    outside a compiled graph. Elsewhere they are plain torch, which a compiler fuses, and whose
    dtypes autocast chooses."""
    if torch.compiler.is_compiling() or x.dtype == torch.float64:
        return False
    if torch.is_autocast_enabled(x.device.type):
        return False
    path = backend(x)
    return path == "cpp" or (path == "triton" and x.is_cuda)


class RMSNorm(nn.Module):
    """weight * x / sqrt(mean(x^2) + eps) over the last dimension, the mean and the root in fp32."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalised `x`, in the dtype of `x`."""
        if runs_fused(x):
            return residual_rms_norm(x, self.weight, eps=self.eps).norm
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)

    def of_sum(self, x: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """x + delta, and that sum normalised."""
        if runs_fused(x):
            return residual_rms_norm(x, self.weight, eps=self.eps, delta=delta)
        total = x + delta
        return total, self(total)


def rope_tables(positions_T: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position * theta^(-2i/d): two fp32 tensors [T, 1, d].

    Computed in every pass instead of kept as a buffer, because `module.to(bfloat16)` would round a
    buffer, and bf16 cannot represent positions beyond 256 exactly.
    """
    steps = torch.arange(0, head_dim, 2, device=positions_T.device, dtype=torch.float32)
    frequencies = 1.0 / theta ** (steps / head_dim)
    angles = positions_T.float()[:, None] * frequencies
    angles = torch.cat((angles, angles), dim=-1)[:, None, :]
    return angles.cos(), angles.sin()


def apply_rope(x_THd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate channel i against channel i + d/2 in fp32; the result has the dtype of the input."""
    wide = x_THd.float()
    first, second = wide.chunk(2, dim=-1)
    rotated = torch.cat((-second, first), dim=-1)
    return (wide * cos + rotated * sin).to(x_THd.dtype)


def head_splitter(head_dim: int) -> Callable[[Tensor], Tensor]:
    """A function [T, H * d] -> [T, H, d].

    Its width is a default argument because torch.compile treats that as a constant. A number in a
    module that FSDP manages would become a symbol, and kernels for symbolic widths are slow.
    """

    def split_heads(x_TD: Tensor, width: int = head_dim) -> Tensor:
        return x_TD.unflatten(-1, (-1, width))

    return split_heads


class SelfAttention(nn.Module):
    """Projections and rotary positions around the attention strategy that is in use."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        width, bias = config.hidden_size, config.qkv_bias
        self._split_heads = head_splitter(config.head_dim)
        self.q_proj = nn.Linear(width, config.num_heads * config.head_dim, bias=bias)
        self.k_proj = nn.Linear(width, config.num_kv_heads * config.head_dim, bias=bias)
        self.v_proj = nn.Linear(width, config.num_kv_heads * config.head_dim, bias=bias)
        self.o_proj = nn.Linear(config.num_heads * config.head_dim, width, bias=False)

    def forward(
        self, x_TD: Tensor, cos: Tensor, sin: Tensor, attention: AttentionStrategy, index: int
    ) -> Tensor:
        """Context rows [T, D]."""
        projections = (self.q_proj, self.k_proj, self.v_proj)
        if runs_fused(x_TD):
            query, key, value = map(self._split_heads, joined_linear(x_TD, projections))
            half = cos.shape[-1] // 2
            query, key = rope(query, key, cos[:, 0, :half], sin[:, 0, :half])
        else:
            query, key, value = (self._split_heads(layer(x_TD)) for layer in projections)
            query, key = apply_rope(query, cos, sin), apply_rope(key, cos, sin)
        return self.o_proj(attention(index, query, key, value).flatten(-2))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), without biases."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        """Rows [T, D]."""
        if runs_fused(x_TD):
            gate_TI, up_TI = joined_linear(x_TD, (self.gate_proj, self.up_proj))
            return self.down_proj(silu_mul(gate_TI, up_TI))
        return self.down_proj(F.silu(self.gate_proj(x_TD)) * self.up_proj(x_TD))


class DecoderLayer(nn.Module):
    """One block: attention and MLP, each after its norm, each added to the residual stream."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = SelfAttention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config)

    def forward(
        self, x_TD: Tensor, cos: Tensor, sin: Tensor, attention: AttentionStrategy, index: int
    ) -> Tensor:
        """Rows [T, D]; `index`, the layer's number, is passed on to the attention strategy.

        An argument, not an attribute: a compiled block is then one graph for all layers.
        """
        attended_TD = self.self_attn(self.input_layernorm(x_TD), cos, sin, attention, index)
        x_TD, normed_TD = self.post_attention_layernorm.of_sum(x_TD, attended_TD)
        return x_TD + self.mlp(normed_TD)


class Decoder(nn.Module):
    """Token embedding, N layers, final norm. The embedding is applied by the caller."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, embeds_TD: Tensor, positions_T: Tensor, attention: AttentionStrategy
    ) -> Tensor:
        """Final-norm hidden states [T, D] of rows `embeds_TD` at `positions_T` (int64)."""
        cos, sin = rope_tables(positions_T, self.config.head_dim, self.config.rope_theta)
        hidden_TD = embeds_TD
        for index, layer in enumerate(self.layers):
            hidden_TD = layer(hidden_TD, cos, sin, attention, index)
        return self.norm(hidden_TD)
