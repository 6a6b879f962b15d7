"""verl's log-probability and entropy functions, in one pass over the logits.

Signatures and shapes are those of `verl.utils.torch_functional` in verl 0.9.1. Differences:
- results are float32 for half-precision logits, also without flash-attn;
- labels of -100 give 0; logits of -inf give no NaN;
- the result is deterministic, and does not depend on whether flash-attn is installed.
"""

import torch
from torch import Tensor

from ..token_stats import is_leaf_memory, token_stats
from ._patching import Patch, Swap

KNOWN_VERSION = "0.9.1"


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """log_softmax(logits) at `labels`, as `verl.utils.torch_functional.logprobs_from_logits`.

    Args:
        logits: (..., V).
        labels: (...).
        inplace_backward: write the gradient over the logits, which saves a tensor of their size.
            This is verl's default; it is done only if the logits are the output of an operation
            and no rows share memory. Autograd then refuses the backward of any other operation
            that saved those logits: pass False if there is one.

    Returns:
        (...) float32.
    """
    inplace = inplace_backward and logits.requires_grad and 0 not in logits.stride()
    inplace = inplace and not is_leaf_memory(logits)
    return token_stats(logits, labels, inplace_backward=inplace).logprob


def entropy_from_logits(logits: Tensor) -> Tensor:
    """Entropy (...) of logits (..., V), as `verl.utils.torch_functional.entropy_from_logits`."""
    any_class = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    return token_stats(logits, any_class).entropy


_FUNCTIONAL = "verl.utils.torch_functional"
PATCH = Patch(
    "verl",
    KNOWN_VERSION,
    tuple(
        Swap(_FUNCTIONAL, function.__name__, function)
        for function in (logprobs_from_logits, entropy_from_logits)
    ),
)
