"""Fused kernels for the statistics that sampling and training a token model need.

One file per op, or a folder; the function's docstring has its equation, shapes, dtypes and errors,
and next to it is `<op>_reference`, the same in eager torch. Every op has a Triton path for GPUs and
a torch path for all other devices; the environment variable `IRIS_KERNELS_BACKEND` (triton, torch,
auto) chooses. `integrations` puts the ops into TRL and verl. The package imports torch and triton
only.
"""

from . import integrations as integrations
from ._backend import backend as backend
from ._backend import uses_triton as uses_triton

# The ops, one line each (and one for the type of a result).
from .add_rms_norm import add_rms_norm as add_rms_norm
from .decode_attention import decode_attention as decode_attention
from .decode_attention import rope_append_attention as rope_append_attention
from .decode_linear import decode_linear as decode_linear
from .decode_linear import decode_linear_partials as decode_linear_partials
from .guided_sample import GuidedSample as GuidedSample
from .guided_sample import guided_sample as guided_sample
from .guided_sample import guided_sample_step as guided_sample_step
from .linear_token_stats import linear_token_stats as linear_token_stats
from .quantize_rows import QuantizedRows as QuantizedRows
from .quantize_rows import quantize_rows as quantize_rows
from .residual_rms_norm import ResidualNorm as ResidualNorm
from .residual_rms_norm import residual_rms_norm as residual_rms_norm
from .rope import rope as rope
from .rope_append import rope_append as rope_append
from .silu_mul import silu_mul as silu_mul
from .token_stats import TokenStats as TokenStats
from .token_stats import token_stats as token_stats
from .vocab_parallel import vocab_parallel_token_stats as vocab_parallel_token_stats
