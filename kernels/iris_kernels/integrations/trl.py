"""TRL's log-probability and entropy functions in one pass over the logits, and its fused head.

Signatures, shapes and masks are those of `trl.trainer.utils` in TRL 1.16. Differences:
- results are float32 for half-precision logits on every device (TRL: on a GPU only);
- any strides, any number of leading dimensions and any V take the same path;
- logits of -inf give no NaN; an index of -100 gives 0 (TRL reads out of bounds);
- a new temperature compiles nothing.

TRL's GRPO, RLOO and KTO trainers call the fused head, `FusedHead` here. DPO and SFT also request
top-1 accuracy from it; then TRL's own head runs. The functions are called by TRL's experimental
trainers.
"""

import math
import warnings

import torch
from torch import Tensor

from ..linear_token_stats import linear_token_stats
from ..token_stats import token_stats
from ._patching import Patch, Swap

KNOWN_VERSION = "1.16.*"


def selective_log_softmax(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> Tensor:
    """log_softmax(logits / temperature) at `index`, as `trl.trainer.utils.selective_log_softmax`.

    Args:
        logits: (..., V).
        index: (...), or (..., K) for K classes per row, which also gathers from the logits; its
            gradient adds a dense (..., V) tensor, as in TRL.
        temperature: a positive number.
        row_mask: same shape as `index`; entries of 0 give 0.

    Returns:
        Log-probabilities, in the shape of `index`.
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

    `chunk_size` is ignored: the softmax is never in memory (on a CPU, only one fixed buffer).
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
        index: (...), one class per row.
        entropy_requires_grad: False detaches the entropy.
        temperature: a positive number, of both.
        row_mask: (...); rows of 0 give 0 and are not read.

    Returns:
        Log-probabilities (...) and entropies (...).
    """
    kept = None if row_mask is None else row_mask != 0
    stats = token_stats(logits, index, temperature=temperature, mask=kept)
    return stats.logprob, stats.entropy if entropy_requires_grad else stats.entropy.detach()


class FusedHead:
    """Replaces TRL's `ChunkedLogProbFunction`: statistics of hidden @ weight.T without the logits.

    Computed by `linear_token_stats`, whose logits are float32 (TRL's have the compute dtype). Under
    autocast a float32 weight is cast as a whole, and its gradient has the autocast dtype first, as
    in torch's own linear (TRL casts block by block and accumulates in float32). Two of TRL's
    optional outputs, softcapped logits and DeepSpeed ZeRO-3 are not supported: then TRL's own
    function runs, with a warning.
    """

    @staticmethod
    def apply(
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
    ) -> tuple[Tensor | None, ...]:
        """Same as `ChunkedLogProbFunction.apply`; `chunk_size` is ignored.

        Returns:
            log-probabilities, entropy, log_sum_sq_probs, mean_logits, is_top1, each [N] or None.
        """
        reason = _unsupported(weight, final_logit_softcapping, logit_scale, outputs)
        if reason is not None:
            warnings.warn(f"TRL's own fused head is used: {reason}", stacklevel=2)
            return PATCH.original(_HEAD).apply(
                hidden, weight, bias, targets, temperature, chunk_size,
                final_logit_softcapping, logit_scale, outputs,
            )  # fmt: skip
        if not torch.is_autocast_enabled(hidden.device.type):
            weight = weight.to(hidden.dtype)
            bias = None if bias is None else bias.to(hidden.dtype)
        stats = linear_token_stats(
            hidden, weight, targets, bias, temperature=temperature / logit_scale
        )
        entropy = stats.entropy if "entropy" in outputs else None
        mean = (stats.nsc + stats.lse).detach() - math.log(weight.shape[0])
        return stats.logprob, entropy, None, mean if "mean_logits" in outputs else None, None


def _unsupported(
    weight: Tensor, softcap: float | None, logit_scale: float, outputs: tuple[str, ...]
) -> str | None:
    """Why `linear_token_stats` cannot compute this, or None."""
    unknown = {"log_sum_sq_probs", "is_top1"} & set(outputs)
    if unknown:
        return f"iris_kernels does not compute {' and '.join(sorted(unknown))}"
    if softcap is not None:
        return "iris_kernels does not support softcapped logits"
    if logit_scale <= 0:
        return f"logit_scale is {logit_scale}, and iris_kernels supports positive scales only"
    if hasattr(weight, "ds_id"):
        return "iris_kernels does not gather weights of DeepSpeed ZeRO-3 in its backward"
    return None


_UTILS = "trl.trainer.utils"
_HEAD = Swap("trl.kernels.chunked_logprob", "ChunkedLogProbFunction", FusedHead)
_FUNCTIONS = (selective_log_softmax, entropy_from_logits, selective_log_softmax_and_entropy)
PATCH = Patch("trl", KNOWN_VERSION, (*(Swap(_UTILS, f.__name__, f) for f in _FUNCTIONS), _HEAD))
