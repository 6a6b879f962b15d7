"""TRL's log-probability and entropy functions, by one pass over the logits.

Signatures, shapes and masks are those of `trl.trainer.utils` in TRL 1.16. What differs:
- results are float32 for half-precision logits on every device (TRL: on a GPU only);
- any strides, any number of leading dimensions and V of any size take the same path;
- logits of -inf give no NaN; an index of -100 gives 0 where TRL reads out of bounds;
- a new temperature compiles nothing.
"""

import torch
from torch import Tensor

from ..token_stats import token_stats
from ._patching import Patch, Swap

KNOWN_VERSION = "1.16.*"


def selective_log_softmax(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> Tensor:
    """log_softmax(logits / temperature) at `index`, as `trl.trainer.utils.selective_log_softmax`.

    Args:
        logits: (..., V).
        index: (...), or (..., K) for K classes a row; K > 1 gathers from the logits besides the
            one pass, and its gradient adds a dense (..., V) tensor, as TRL's own does.
        temperature: a positive number.
        row_mask: shaped like `index`; entries of 0 give 0.

    Returns:
        Shaped like `index`.
    """
    kept = None if row_mask is None else row_mask != 0
    if index.dim() < logits.dim():
        return token_stats(logits, index, temperature=temperature, mask=kept).logprob
    any_class = index.new_zeros(logits.shape[:-1])
    lse = token_stats(logits, any_class, temperature=temperature).lse[..., None]
    logprobs = logits.gather(-1, index).to(lse.dtype) / temperature - lse
    return logprobs if kept is None else logprobs.masked_fill(~kept, 0.0)


def entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
    """Entropy (...) of logits (..., V), as `trl.trainer.utils.entropy_from_logits`.

    `chunk_size` is taken and not needed: no chunk is ever held in more than registers (on a CPU,
    than a fixed buffer).
    """
    any_class = torch.zeros(logits.shape[:-1], dtype=torch.int64, device=logits.device)
    return token_stats(logits, any_class).entropy


def selective_log_softmax_and_entropy(
    logits: Tensor,
    index: Tensor,
    entropy_requires_grad: bool = True,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Both in one pass, as `trl.trainer.utils.selective_log_softmax_and_entropy`.

    Args:
        logits: (..., V).
        index: (...), one class a row.
        entropy_requires_grad: False detaches the entropy.
        temperature: a positive number, of both.
        row_mask: (...); rows of 0 give 0 and are not read.

    Returns:
        Log-probabilities (...) and entropies (...).
    """
    kept = None if row_mask is None else row_mask != 0
    stats = token_stats(logits, index, temperature=temperature, mask=kept)
    return stats.logprob, stats.entropy if entropy_requires_grad else stats.entropy.detach()


_HOME = "trl.trainer.utils"
PATCH = Patch(
    "trl",
    KNOWN_VERSION,
    tuple(
        Swap(_HOME, function.__name__, function)
        for function in (
            selective_log_softmax,
            entropy_from_logits,
            selective_log_softmax_and_entropy,
        )
    ),
)
