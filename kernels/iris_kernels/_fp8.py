"""float8_e4m3fn: 3 mantissa bits, up to 448, no infinity; Triton supports it from sm_89 on."""

import torch

from ._backend import jit, tl

FP8 = torch.float8_e4m3fn
FP8_MAX = int(torch.finfo(FP8).max)


@jit
def saturate(x, FP8_MAX: tl.constexpr):
    """Clamp fp32 `x` to [-FP8_MAX, FP8_MAX], outside of which a cast may give NaN; NaN stays."""
    nan: tl.constexpr = tl.PropagateNan.ALL
    return tl.minimum(
        tl.maximum(x, -1.0 * FP8_MAX, propagate_nan=nan), 1.0 * FP8_MAX, propagate_nan=nan
    )
