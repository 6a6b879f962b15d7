"""float8_e4m3fn: three bits of mantissa, up to 448, no infinity; Triton knows it from sm_89 on."""

import torch

from ._backend import jit, tl

FP8 = torch.float8_e4m3fn
LARGEST = int(torch.finfo(FP8).max)


@jit
def within(x, LARGEST: tl.constexpr):
    """fp32 `x` cut at LARGEST on both sides, beyond which a conversion may give NaN; NaN stays."""
    nan: tl.constexpr = tl.PropagateNan.ALL
    return tl.minimum(
        tl.maximum(x, -1.0 * LARGEST, propagate_nan=nan), 1.0 * LARGEST, propagate_nan=nan
    )
