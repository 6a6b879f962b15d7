"""The policy's own certainty as the reward of a TRL run; needs no labels and no reward model.

    reward = mean over the completion's tokens of KL(U || p) = lse(x) - mean(x) - log V

The reward of "Learning to Reason without External Rewards" (arXiv 2505.19590); its negative is the
NSC of IRIS (arXiv 2509.25562).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import IGNORE_INDEX
from ..token_stats import token_stats


class SelfCertaintyReward:
    """Self-certainty of the policy over each completion, for `GRPOTrainer(reward_funcs=...)`.

        reward = SelfCertaintyReward(model, tokenizer)
        trainer = GRPOTrainer(model=model, processing_class=tokenizer, reward_funcs=reward, ...)

    TRL passes no logits to a reward function, so this runs the model once more over prompts and
    completions, without gradients: about a third of the cost of the loss's forward and backward.
    Memory: the logits of `batch_size` sequences. To reward uncertainty (IRIS on image tokens),
    set a negative weight: `GRPOConfig(reward_weights=[-1.0])`.

    Args:
        model: the causal language model that is trained, the same object. If the trainer shards
            its weights (FSDP, DeepSpeed ZeRO-3), set `reward.model = trainer.model_wrapped` once
            the trainer exists.
        processing_class: the trainer's tokenizer.
        reduction: "mean" over the completion's tokens, or "sum".
        temperature: of the distribution; 1 is the model's own.
        batch_size: sequences per forward pass.
        chat_template_kwargs: as in `GRPOConfig`, for conversational prompts.

    Raises:
        ValueError: `reduction` is neither "mean" nor "sum", or `batch_size` is less than 1.
    """

    __name__ = "self_certainty"  # TRL logs rewards/self_certainty/mean

    def __init__(
        self,
        model: nn.Module,
        processing_class: Any,
        *,
        reduction: str = "mean",
        temperature: float = 1.0,
        batch_size: int = 4,
        chat_template_kwargs: dict[str, Any] | None = None,
    ):
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction is {reduction!r}: pass 'mean' or 'sum'")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}: pass at least 1")
        self.model = model
        self.processing_class = processing_class
        self.reduction = reduction
        self.temperature = temperature
        self.batch_size = batch_size
        self.chat_template_kwargs = chat_template_kwargs or {}

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        completion_ids: Sequence[Sequence[int]],
        **_: Any,
    ) -> list[float | None]:
        """One reward per completion, in order; None for a completion without tokens."""
        prompt_ids = self._tokenize(prompts)
        rewards: list[float | None] = []
        for start in range(0, len(prompts), self.batch_size):
            part = slice(start, start + self.batch_size)
            rewards += self._score(prompt_ids[part], completion_ids[part])
        return rewards

    def _tokenize(self, prompts: Sequence[Any]) -> list[list[int]]:
        """Same as GRPOTrainer, for plain and conversational prompts."""
        if isinstance(prompts[0], str):
            return self.processing_class(text=list(prompts))["input_ids"]
        return self.processing_class.apply_chat_template(
            conversation=list(prompts), add_generation_prompt=True, tokenize=True,
            return_dict=True, **self.chat_template_kwargs,
        )["input_ids"]  # fmt: skip

    @torch.no_grad()
    def _score(
        self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]]
    ) -> list[float | None]:
        device = next(self.model.parameters()).device
        sequences = [[*p, *c] for p, c in zip(prompt_ids, completion_ids, strict=True)]
        shape = (len(sequences), max(map(len, sequences)))
        # Padding on the right shifts no positions, and causal attention never reaches it.
        input_ids = torch.zeros(shape, dtype=torch.int64)
        attention_mask = torch.zeros(shape, dtype=torch.int64)
        labels = torch.full(shape, IGNORE_INDEX)
        for row, (sequence, prompt) in enumerate(zip(sequences, prompt_ids, strict=True)):
            ids = torch.tensor(sequence)
            input_ids[row, : len(ids)] = ids
            attention_mask[row, : len(ids)] = 1
            labels[row, len(prompt) : len(ids)] = ids[len(prompt) :]
        logits = self._logits(input_ids.to(device), attention_mask.to(device))[:, :-1]
        stats = token_stats(logits, labels[:, 1:].to(device), temperature=self.temperature)
        total = -stats.nsc.sum(-1)
        if self.reduction == "mean":
            total = total / torch.tensor([max(1, len(c)) for c in completion_ids], device=device)
        pairs = zip(total.tolist(), completion_ids, strict=True)
        return [reward if len(c) else None for reward, c in pairs]

    def _logits(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        training = self.model.training
        self.model.eval()  # no dropout
        try:
            output = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        finally:
            self.model.train(training)
        return output.logits
