"""The values of the fixture `backend`."""

import pytest
import torch

# On a machine with a GPU, the Triton half of the tests is selected by the gpu marker.
ON_A_GPU = [pytest.mark.gpu] if torch.cuda.is_available() else []
TRITON = pytest.param("triton", marks=ON_A_GPU)
# Of an op without a C++ kernel: with "cpp" it takes its torch path.
without_cpp = pytest.mark.parametrize("backend", ["torch", TRITON], indirect=True)
