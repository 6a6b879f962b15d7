"""Write `iris_kernels` as a Hugging Face Kernel Hub repository: its source, and loadable builds.

    python kernels/assemble_hub.py OUT [--repo-id NAME/iris-kernels]

OUT (new or empty) then holds
    build.toml, torch-ext/iris_kernels/    what kernel-builder builds from
    build/torch-cuda/, build/torch-cpu/    built variants, which `kernels.get_kernel` loads
    README.md, LICENSE
Upload it with `hf upload NAME/iris-kernels OUT --repo-type kernel`. To try it first:
    from kernels import get_local_kernel
    iris_kernels = get_local_kernel(pathlib.Path("OUT"))

Nothing is compiled. The variants differ from the source only in `_ops.py`, which gives the custom
ops a unique namespace, so that a copy can be loaded together with the installed package and with
other versions of itself.
"""

import argparse
import hashlib
import json
import re
import shutil
import sys
import tomllib
from pathlib import Path

KERNELS = Path(__file__).parent
PACKAGE = KERNELS / "iris_kernels"
OPS = '''"""The namespace of this copy's custom ops."""


def add_op_namespace_prefix(op_name: str) -> str:
    """Full name under which an op is registered."""
    return f"{namespace}::{{op_name}}"
'''


def sources() -> dict[str, str]:
    """Relative path -> text of every module except `_ops.py`, which differs in each copy."""
    found = {
        path.relative_to(PACKAGE).as_posix(): path.read_text(encoding="utf-8")
        for path in sorted(PACKAGE.rglob("*.py"))
    }
    del found["_ops.py"]
    return found


def check_imports(files: dict[str, str]) -> None:
    """Check that modules import each other relatively: a copy has another name than iris_kernels.

    Raises:
        ValueError: a module imports iris_kernels by name.
    """
    absolute = re.compile(r"^\s*(?:from|import) iris_kernels\b", re.MULTILINE)
    for name, text in files.items():
        if absolute.search(text):
            raise ValueError(f"{name} imports iris_kernels by name: import it relatively")


def assemble(out: Path, repo_id: str | None = None) -> None:
    """Write the repository into `out`.

    Raises:
        ValueError: `out` is not empty, or a module imports iris_kernels by name.
    """
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty: pass a new or empty folder")
    files = sources()
    check_imports(files)
    build_toml = (KERNELS / "hub" / "build.toml").read_text(encoding="utf-8")
    settings = tomllib.loads(build_toml)["general"]
    placeholder = settings["hub"]["repo-id"]
    repo_id = repo_id or placeholder
    card = (KERNELS / "hub" / "CARD.md").read_text(encoding="utf-8")
    card = card.replace("REPO_ID", repo_id).replace("VERSION", str(settings["version"]))

    _write(out / "torch-ext" / PACKAGE.name, files)
    for backend in settings["backends"]:
        namespace = f"_{PACKAGE.name}_{backend}_{_digest(files)}"
        metadata = {
            "name": settings["name"],
            "id": namespace,
            "version": settings["version"],
            "license": settings["license"],
            "python-depends": [],
            "backend": {"type": backend},
        }
        own = {
            "_ops.py": OPS.format(namespace=namespace),
            "metadata.json": json.dumps(metadata, indent=2) + "\n",
        }
        _write(out / "build" / f"torch-{backend}", files | own)
    _write(out, {"build.toml": build_toml.replace(placeholder, repo_id), "README.md": card})
    shutil.copy(KERNELS.parent / "LICENSE", out)


def _digest(files: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:12]


def _write(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def main() -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="a new or empty folder")
    parser.add_argument("--repo-id", help="the repository on the hub, NAME/iris-kernels")
    arguments = parser.parse_args()
    try:
        assemble(arguments.out, arguments.repo_id)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
