"""The namespace of the custom ops.

A copy from the Hugging Face Kernel Hub has its own `_ops.py` with its own namespace, so that the
copy and the installed package can be loaded together.
"""


def add_op_namespace_prefix(op_name: str) -> str:
    """Full name under which an op is registered."""
    return f"iris_kernels::{op_name}"
