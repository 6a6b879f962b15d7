"""Two packages from one tree: `iris_fast` (the trainer) and `iris_kernels` (the kernels alone)."""

import runpy
from pathlib import Path

from setuptools import Extension, find_packages, setup

# What the kernels need, and nothing else.
KERNELS = [
    "torch>=2.11",  # tensors, autograd, custom ops
    "triton>=3.6; platform_system == 'Linux'",  # the GPU kernels; interpreted on a CPU in tests
]

TRAIN = [
    "numpy>=1.26",  # image grids, .npz codes
    "safetensors>=0.5",  # weights and checkpoints, without pickle
    "tokenizers>=0.21",  # the checkpoints' own tokenizer.json, exactly
    "jsonargparse[signatures]>=4.38",  # typed command line, YAML, --print_config
    "pyyaml>=6",  # configuration files and presets
    "jinja2>=3.1",  # report.html
    "accelerate>=1.10",  # trackers: tensorboard, wandb, trackio
    "huggingface-hub>=0.30",  # a model that the user names by its hub id
    "pillow>=10",  # PNG
    "tqdm>=4.66",  # progress bars
    "torchao>=0.15",  # AdamW with 8-bit or bfloat16 moments
    "scipy>=1.12",  # ndimage.label: the tiny world's verifier finds things by connected regions
]

LORA = [
    "peft>=0.18",  # the adapters of --use_peft; brings transformers along
]

TEST = [
    "pytest>=8",
    "pytest-xdist>=3.6",  # both cores
    "hypothesis>=6.100",  # properties
    "transformers>=5.17",  # the oracle for Janus
    "datasets>=4",  # prompts from a Hugging Face dataset
    "tensorboard>=2.16",  # the tracker that needs no account
    "ruff>=0.9",
    "trl==1.16.*",  # the drop-ins against the real functions and the real trainer
    "kernels==0.17.2",  # the Kernel Hub's loader
    "matplotlib>=3.9",  # the benchmark report
]

BENCH = [
    "matplotlib>=3.9",  # plots
    "pytest-benchmark>=5",  # the same cases, for one's own regression tracking
    "trl==1.16.*",  # peers
    "liger-kernel>=0.8.5; platform_system == 'Linux'",
    "cut-cross-entropy>=25.1; platform_system == 'Linux'",
]

ATTENTION = [
    "flash-attn>=2.8",  # variable-length attention; needs nvcc to build
    "xformers>=0.0.33",  # block-diagonal masks, split-K decoding
]

ROOT = Path(__file__).parent
# The CPU's kernels in C++, one library per instruction set.
EXTENSIONS = runpy.run_path(str(ROOT / "kernels/iris_kernels/cpp/build.py"))["extensions"]

setup(
    name="iris-fast",
    version="0.1.0",
    description="GRPO with intrinsic rewards for autoregressive text-to-image models",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[
        *find_packages(include=["iris_fast", "iris_fast.*"]),
        *find_packages("kernels", include=["iris_kernels", "iris_kernels.*"]),
    ],
    package_dir={"iris_kernels": "kernels/iris_kernels"},
    ext_modules=[Extension(**arguments) for arguments in EXTENSIONS(ROOT)],
    package_data={
        "iris_kernels": ["cpp/*.cpp", "cpp/*.h"],
        "iris_fast": [
            "**/*.txt",
            "**/*.jsonl",
            "**/*.json",
            "**/*.yaml",
            "**/*.jinja",
            "**/*.safetensors",
            "**/*.md",
            "**/*.svg",
        ],
    },
    entry_points={
        "console_scripts": [
            f"iris-fast-{command} = iris_fast.__main__:{command}"
            for command in ("train", "generate", "export", "env")
        ]
    },
    install_requires=KERNELS,
    extras_require={
        "train": TRAIN,
        "lora": LORA,
        "test": TRAIN + LORA + TEST,
        "bench": BENCH,
        "attention": ATTENTION,
    },
)
