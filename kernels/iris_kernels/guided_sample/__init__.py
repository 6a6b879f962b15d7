"""Classifier-free guidance, sampling and the sampled token's statistics.

op.py            equations, the custom op, the public function, the eager reference
step.py          the form that reads and writes the buffers of a decoding loop
triton_path.py   one kernel launch
torch_path.py    chunks of rows in torch
outputs.py       the tensors that both fill
"""

from .op import GuidedSample as GuidedSample
from .op import guided_sample as guided_sample
from .op import guided_sample_reference as guided_sample_reference
from .step import guided_sample_step as guided_sample_step
from .torch_path import mix as mix
from .torch_path import sample_torch as sample_torch
from .triton_path import sample_launch as sample_launch
from .triton_path import sample_triton as sample_triton
