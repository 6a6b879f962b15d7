"""verl's log-probability and entropy functions, by one pass over the logits.

Signatures and shapes are those of `verl.utils.torch_functional` in verl 0.9.1. What differs:
- results are float32 for half-precision logits, also without flash-attn;
- labels of -100 give 0; logits of -inf give no NaN;
- the result does not depend on flash-attn being installed, and is deterministic.
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
        inplace_backward: the gradient replaces the logits, which saves a tensor of their size.
            verl asks for it by default; it is done where the logits come out of an operation and
            no two rows share memory. Autograd then refuses the backward of any other operation
            that had kept those logits: pass False where there is one.

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


_HOME = "verl.utils.torch_functional"
PATCH = Patch(
    "verl",
    KNOWN_VERSION,
    tuple(
        Swap(_HOME, function.__name__, function)
        for function in (logprobs_from_logits, entropy_from_logits)
    ),
)
