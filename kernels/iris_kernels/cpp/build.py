"""How the C++ kernels are compiled; `setup.py` runs this file, so it imports no other of ours."""

import hashlib
import platform
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
# Every instruction set is a library of its own; the one that torch itself would use is loaded.
X86_FLAGS = {
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": [
        "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c",
        "-mprefer-vector-width=512",
    ],
}  # fmt: skip
FLAGS = [
    "-std=c++17",
    "-O3",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",  # the sampling weights are separately rounded operations
    "-fno-exceptions",
    "-fno-rtti",
    "-fvisibility=default",
    "-Wno-psabi",
]


def sources() -> list[Path]:
    """The files of C++, in a fixed order."""
    return sorted(FOLDER.glob("*.cpp")) + sorted(FOLDER.glob("*.h"))


def source_hash() -> str:
    """Identifies the sources that a library was compiled from."""
    digest = hashlib.sha256()
    for path in sources():
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def instruction_sets() -> dict[str, list[str]]:
    """Name -> compiler flags of the libraries for this kind of machine."""
    if platform.machine() in ("x86_64", "AMD64"):
        return X86_FLAGS
    return {"base": []}


def extensions(root: Path) -> list[dict]:
    """The arguments of the `setuptools.Extension`s, with paths relative to `root`. Without a C++
    compiler installation continues, and the ops take their torch path."""
    files = [path.relative_to(root.resolve()).as_posix() for path in sources()]
    return [
        {
            "name": f"iris_kernels.cpp._{name}",
            "sources": [file for file in files if file.endswith(".cpp")],
            "depends": [file for file in files if file.endswith(".h")],
            "define_macros": [("IRIS_SOURCES", f'"{source_hash()}"')],
            "extra_compile_args": [*FLAGS, *flags],
            "extra_link_args": ["-fopenmp"],
            "language": "c++",
            "optional": True,
        }
        for name, flags in instruction_sets().items()
    ]
