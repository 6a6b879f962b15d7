"""Cases of the two RMSNorms."""

import torch
from torch import Tensor

# name: (shape, dtype)
REGIMES = {
    "janus_1b": ((3, 2048), torch.bfloat16),
    "janus_7b": ((2, 4096), torch.float32),
    "not_a_power_of_two": ((2, 3, 100), torch.float32),
    "odd": ((3, 137), torch.bfloat16),
    "narrow": ((5, 16), torch.float16),
    "one_channel": ((2, 1), torch.float32),
    "one_row": ((48,), torch.bfloat16),
}
NORM_EPS = 1e-6


def case(shape, dtype, device, seed=0) -> list[Tensor]:
    """Residual stream, addend and weight."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(size, generator=generator) for size in (shape, shape, shape[-1:])]
    return [t.to(device, dtype) for t in tensors]
