"""The versions and hardware, for bug reports: `python -m iris_fast.env`."""

import importlib.metadata
import os
import platform
import sys

import torch
from iris_kernels import cpp

from iris_fast import __version__
from iris_fast.cli import CommandParser
from iris_fast.errors import UserError, report_error

PROGRAM = "iris_fast.env"
PACKAGES = (
    "torch", "triton", "transformers", "tokenizers", "safetensors", "jsonargparse", "accelerate",
    "numpy", "pillow", "datasets", "flash-attn", "xformers",
)  # fmt: skip
SETTINGS = ("IRIS_KERNELS_BACKEND", "TRITON_INTERPRET", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")


def report() -> str:
    """The report, one line per package and device."""
    lines = [
        f"iris-fast: {__version__}",
        f"python: {platform.python_version()} on {platform.platform()}",
        f"cpu: {os.cpu_count()} cores",
    ]
    for name in PACKAGES:
        try:
            lines.append(f"{name}: {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"{name}: not installed")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            memory = f"{properties.total_memory / 2**30:.0f} GiB"
            lines.append(f"gpu {index}: {properties.name}, {memory}, CUDA {torch.version.cuda}")
    else:
        lines.append("gpu: none")
    compiled = "compiled" if cpp.library() is not None else "not compiled: slower torch path"
    lines.append(f"C++ kernels for {torch.backends.cpu.get_cpu_capability()}: {compiled}")
    lines += [f"{name}={os.environ[name]}" for name in SETTINGS if name in os.environ]
    return "\n".join(lines)


def main() -> int:
    """Run the command and return its exit code."""
    try:
        CommandParser(prog=PROGRAM, description=__doc__.splitlines()[0]).parse_args()
    except UserError as error:
        return report_error(PROGRAM, error)
    print(report())
    return 0


if __name__ == "__main__":
    sys.exit(main())
