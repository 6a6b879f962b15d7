"""The namespace of this copy's custom ops.

A copy from the Hugging Face Kernel Hub has another `_ops.py`, with a namespace of its own, so that
it and the installed package load side by side.
"""

import torch

ops = torch.ops.iris_kernels


def add_op_namespace_prefix(op_name: str) -> str:
    """The full name of an op: register and look up ops under it."""
    return f"iris_kernels::{op_name}"
