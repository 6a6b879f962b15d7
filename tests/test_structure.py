"""The structure of the project: import order, file sizes, installed files, lint."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from iris_fast import __version__

ROOT = Path(__file__).parent.parent
LONGEST_FILE = 400  # "about 400"

# Data flows down this list: a module of iris_fast imports only what stands above it.
FLOW = [
    "errors",
    "fields",
    "rewards.table",
    "checks",
    "config",
    "cli",
    "records",
    "models",
    "rollout",
    "prompts",
    "tiny",
    "distributed",
    "preflight",
    "rewards",
    "grpo",
    "run",
]
COMMANDS = sorted(
    path.stem
    for path in (ROOT / "iris_fast").glob("*.py")
    if '__name__ == "__main__"' in path.read_text(encoding="utf-8")
)


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imports(path: Path) -> set[str]:
    """Absolute modules that a file imports anywhere, `from a import b` as a.b too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def part_of(path: Path) -> str:
    """The entry of FLOW or COMMANDS that a file of iris_fast belongs to."""
    return part(".".join(path.relative_to(ROOT).with_suffix("").parts))


def part(module: str) -> str:
    """The same of a module, such as `iris_fast.run.log.Log`."""
    name, inner = [*module.split("."), "", ""][1:3]
    apart = f"{name}.{inner}"  # these parts of a folder have a place of their own
    return apart if apart in ("tiny.recipe", "rewards.table") else name


def test_every_module_has_its_place_in_the_flow():
    parts = {part_of(path) for path in sources("iris_fast")} - {"__init__"}
    assert parts == {*FLOW, *COMMANDS, "tiny.recipe"}
    assert {"train", "generate", "export", "env"} <= set(COMMANDS)


def test_imports_go_with_the_flow():
    order = {name: place for place, name in enumerate([*FLOW, *COMMANDS, "tiny.recipe"])}
    wrong = []
    for path in sources("iris_fast"):
        own = part_of(path)
        for module in imports(path):
            other = part(module)
            if not module.startswith("iris_fast.") or other not in order or other == own:
                continue
            if order[other] > order.get(own, -1):
                wrong.append(f"{path.relative_to(ROOT)} imports {module}")
    assert not wrong


def test_nothing_imports_a_command():
    folders = ["iris_fast", "kernels", "bench"]
    for path in (path for folder in folders for path in sources(folder)):
        commands = {f"iris_fast.{name}" for name in COMMANDS}
        assert commands.isdisjoint(imports(path)), path


def test_the_kernels_import_torch_and_triton_and_nothing_else():
    allowed = {*sys.stdlib_module_names, "torch", "triton"}
    for path in sources("kernels"):
        roots = {module.partition(".")[0] for module in imports(path)}
        assert roots <= allowed, (path, roots - allowed)


def test_the_kernels_import_without_anything_else_installed():
    """Every package but torch's own is hidden; `-S` alone would hide torch too."""
    program = """
import sys
hidden = {"iris_fast", "numpy", "transformers", "safetensors", "jsonargparse", "PIL", "tqdm"}
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in hidden:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hide())
import iris_kernels
print(sorted(vars(iris_kernels)))
"""
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    assert "token_stats" in found.stdout


def test_there_is_no_package_called_kernels():
    """It would hide Hugging Face's `kernels` from transformers."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("module", ["iris_fast", "iris_fast.config", "iris_fast.errors"])
def test_what_parses_a_command_line_does_not_import_torch(module):
    program = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


def test_files_are_short():
    long = {
        str(path.relative_to(ROOT)): lines
        for folder in ("iris_fast", "kernels", "bench")
        for path in sources(folder)
        if (lines := len(path.read_text().splitlines())) > LONGEST_FILE
    }
    assert not long


def test_ruff_passes():
    """Includes docstrings of all public names."""
    ruff = shutil.which("ruff") or pytest.skip("needs ruff")
    for words in (["check"], ["format", "--check"]):
        found = subprocess.run(
            [ruff, *words, "--no-cache", "."], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert found.returncode == 0, found.stdout


def test_tests_are_collected_where_optional_packages_are_missing(tmp_path):
    """A machine with a GPU may lack them: their tests are skipped, the others still run."""
    (tmp_path / "sitecustomize.py").write_text("""
import sys
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("jsonargparse", "docstring_parser", "torchao"):
            raise ModuleNotFoundError(f"No module named '{name}'", name=name)
sys.meta_path.insert(0, Hide())
""")
    places = [str(tmp_path), str(ROOT), str(ROOT / "kernels")]
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "gpu", "--collect-only", "-q", "-p",
         "no:cacheprovider", "tests/test_config.py", "tests/test_engine.py"],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(places)},
    )  # fmt: skip
    assert found.returncode == 0, found.stdout
    assert "tests/test_engine.py::test_a_replayed_graph" in found.stdout
    assert "tests/test_config.py:0: needs docstring_parser" in found.stdout


# --- What comes with the code -------------------------------------------------------------------


def test_the_documents_are_there():
    for name in ("LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "constraints.txt", ".ci/run"):
        assert (ROOT / name).stat().st_size > 100, name
    assert (ROOT / ".ci/run").stat().st_mode & 0o111


def test_the_version_is_one():
    assert f'version="{__version__}"' in (ROOT / "setup.py").read_text()


def test_every_data_file_is_installed():
    patterns = re.findall(r'"\*\*/\*(\.\w+)"', (ROOT / "setup.py").read_text())
    data = [
        path
        for path in (ROOT / "iris_fast").rglob("*")
        if path.is_file() and path.suffix not in (".py", ".pyc")
    ]
    assert data
    assert {path.suffix for path in data} <= set(patterns)
