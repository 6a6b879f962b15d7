"""iris-fast: GRPO with intrinsic rewards for autoregressive text-to-image models."""

__version__ = "0.1.0"
