"""Attention of one new token per sequence over the live entries of a static key-value cache.

op.py            equations, the custom ops, the public functions, the eager reference
triton_path.py   one or two kernel launches, with rotary positions and the cache update
cpp_path.py      one parallel region on a CPU
torch_path.py    torch's attention per group of equal lengths
checks.py        argument checks
"""

from .checks import NewToken as NewToken
from .op import decode_attention as decode_attention
from .op import decode_attention_reference as decode_attention_reference
from .op import rope_append_attention as rope_append_attention
from .torch_path import decode_torch as decode_torch
from .triton_path import CHUNK as CHUNK
from .triton_path import decode_launch as decode_launch
from .triton_path import decode_triton as decode_triton
