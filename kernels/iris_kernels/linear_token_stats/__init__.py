"""`token_stats` of hidden @ weight.T + bias, without ever holding the [R, V] logits.

op.py      equations, custom ops, autograd, the public function, the eager reference
tiles.py   forward and backward over tiles of logits
"""

from .op import linear_token_stats as linear_token_stats
from .op import linear_token_stats_reference as linear_token_stats_reference
from .tiles import tile_shape as tile_shape
