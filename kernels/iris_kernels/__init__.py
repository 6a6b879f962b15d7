"""Fused kernels for the statistics that sampling and training a token model need.

    token_stats          logits -> logprob, nsc, entropy, lse of one token a row, differentiable
    linear_token_stats   the same from hidden states and a head, without holding the logits
    vocab_parallel_token_stats  the same for a vocabulary sharded over the ranks of a group
    decode_attention     one new token a sequence over the live part of a static cache
    guided_sample        cond and uncond logits -> a sampled token and its statistics, one launch

and, for one decoding step, what lies between its matrix products in one launch each:

    add_rms_norm         residual stream + what a block gives, and the norm that follows
    rope_append          rotary positions, and the new key and value into a static cache
    silu_mul             the gate of a SwiGLU
    quantize_rows        rows as float8_e4m3fn with a scale each

Every op has a Triton path for GPUs and a torch path for everything else; `IRIS_KERNELS_BACKEND`
(triton, torch, auto) chooses. The package imports torch and triton and nothing else.
"""

from . import integrations as integrations
from .add_rms_norm import add_rms_norm
from .decode_attention import decode_attention
from .guided_sample import GuidedSample, guided_sample
from .linear_token_stats import linear_token_stats
from .quantize_rows import QuantizedRows, quantize_rows
from .rope_append import rope_append
from .silu_mul import silu_mul
from .token_stats import TokenStats, token_stats
from .vocab_parallel import vocab_parallel_token_stats

__all__ = [
    "GuidedSample",
    "QuantizedRows",
    "TokenStats",
    "add_rms_norm",
    "decode_attention",
    "guided_sample",
    "linear_token_stats",
    "quantize_rows",
    "rope_append",
    "silu_mul",
    "token_stats",
    "vocab_parallel_token_stats",
]
