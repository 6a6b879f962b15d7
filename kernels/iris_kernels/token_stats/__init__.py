"""Log-probability, negative self-certainty, entropy and logsumexp of one token per row.

    op.py            equations, custom ops, autograd, the public function, the eager reference
    triton_path.py   forward and backward in Triton
    torch_path.py    forward and backward in torch
    columns.py       a block of a row's columns, and how blocks are merged

`linear_token_stats` runs both paths on one tile of logits after the other.
"""

from .columns import Columns as Columns
from .op import TokenStats as TokenStats
from .op import is_leaf_memory as is_leaf_memory
from .op import token_stats as token_stats
from .op import token_stats_reference as token_stats_reference
from .torch_path import backward_torch as backward_torch
from .torch_path import forward_torch as forward_torch
from .triton_path import backward_triton as backward_triton
from .triton_path import forward_launch as forward_launch
from .triton_path import forward_triton as forward_triton
