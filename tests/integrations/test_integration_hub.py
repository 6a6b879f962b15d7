"""The Kernel Hub layout: its contents, and that Hugging Face's loader runs the ops from it."""

import ast
import importlib.util
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import iris_kernels
import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

ROOT = Path(__file__).parent.parent.parent
TOOL = ROOT / "kernels" / "assemble_hub.py"


def load_tool():
    spec = importlib.util.spec_from_file_location("assemble_hub", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """The repository, assembled by the command."""
    out = tmp_path_factory.mktemp("hub") / "repository"
    command = [sys.executable, str(TOOL), str(out), "--repo-id", "someone/iris-kernels"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def loaded(hub):
    """The CPU variant through `kernels`, while the installed package is loaded too."""
    kernels = pytest.importorskip("kernels", reason="Hugging Face kernels is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        return kernels.get_local_kernel(hub, backend="cpu")


def test_source_and_variants_are_where_builder_and_loader_expect_them(hub):
    settings = tomllib.loads((hub / "build.toml").read_text())
    assert settings["general"]["edition"] == 5
    assert settings["general"]["hub"]["repo-id"] == "someone/iris-kernels"
    assert settings["torch-noarch"] == {}
    modules = {p.relative_to(hub / "torch-ext" / "iris_kernels")
               for p in hub.glob("torch-ext/iris_kernels/**/*.py")}  # fmt: skip
    assert Path("token_stats/op.py") in modules and Path("integrations/trl.py") in modules
    assert Path("_ops.py") not in modules  # kernel-builder writes it
    for backend in ("cuda", "cpu"):
        variant = hub / "build" / f"torch-{backend}"
        assert {p.relative_to(variant) for p in variant.rglob("*.py")} == modules | {
            Path("_ops.py")
        }
        metadata = json.loads((variant / "metadata.json").read_text())
        assert metadata["backend"] == {"type": backend}
        assert metadata["python-depends"] == []
    assert "someone/iris-kernels" in (hub / "README.md").read_text()
    assert (hub / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()


def test_variants_have_unique_names(hub):
    ids = [json.loads(p.read_text())["id"] for p in hub.glob("build/*/metadata.json")]
    assert len(set(ids)) == len(ids) == 2
    assert "iris_kernels" not in ids


def test_changed_sources_give_another_name(hub):
    tool = load_tool()
    files = tool.sources()
    assert tool._digest(files) != tool._digest(files | {"silu_mul.py": "changed"})
    assert (
        tool._digest(files)
        in json.loads((hub / "build" / "torch-cpu" / "metadata.json").read_text())["id"]
    )


def test_modules_import_each_other_relatively(hub):
    for path in hub.glob("torch-ext/**/*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            assert not any(name.split(".")[0] == "iris_kernels" for name in names), path


def test_an_absolute_import_is_refused():
    tool = load_tool()
    with pytest.raises(ValueError, match=r"x\.py imports iris_kernels by name"):
        tool.check_imports({"x.py": "import torch\nfrom iris_kernels.token_stats import f\n"})
    tool.check_imports({"x.py": '"""import iris_kernels in a sentence"""\nfrom . import y\n'})


def test_a_folder_that_is_not_empty_is_refused(tmp_path):
    (tmp_path / "mine").write_text("keep")
    command = [sys.executable, str(TOOL), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "not empty" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 77, generator=generator, requires_grad=True)
    return logits, torch.randint(0, 77, (5,), generator=generator)


def test_the_loaded_copy_runs_its_own_ops(loaded, inputs, monkeypatch):
    monkeypatch.setenv("IRIS_KERNELS_BACKEND", "torch")  # a copy has no C++ libraries
    assert loaded.__name__ != "iris_kernels"
    assert loaded.token_stats is not iris_kernels.token_stats
    logits, ids = inputs
    upstream = torch.linspace(-1, 1, 5)
    results = []
    for package in (loaded, iris_kernels):
        # In a graph: eager calls on a CPU run the torch path without the custom op.
        graph = make_fx(lambda *two, run=package.token_stats: run(*two))(logits.detach(), ids)
        names = {str(node.target).split(".")[0] for node in graph.graph.nodes}
        assert package.__name__ in names
        assert len(names & {loaded.__name__, "iris_kernels"}) == 1
        stats = package.token_stats(logits, ids)
        total = (upstream * (stats.logprob + stats.nsc + stats.entropy)).sum()
        results.append((*stats, torch.autograd.grad(total, logits)[0]))
    for mine, installed in zip(*results, strict=True):
        assert torch.equal(mine, installed)


def test_the_loaded_copy_compiles_without_graph_breaks(loaded, inputs):
    def loss(logits, ids):
        stats = loaded.token_stats(logits, ids, temperature=0.7)
        return (stats.logprob * 2 + stats.entropy).sum()

    logits, ids = inputs
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits, ids), loss(logits, ids))
    grads = [torch.autograd.grad(f(logits, ids), logits)[0] for f in (compiled, loss)]
    torch.testing.assert_close(*grads)


def test_the_loaded_copy_samples_and_has_the_integrations(loaded):
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(1))
    uniform = torch.tensor([0.1, 0.5, 0.9])
    sampled = loaded.guided_sample(logits, None, uniform, cfg_weight=1.0)
    expected = iris_kernels.guided_sample(logits, None, uniform, cfg_weight=1.0)
    assert torch.equal(sampled.token_ids, expected.token_ids)
    assert callable(loaded.integrations.patch_trl)


def test_there_is_no_package_that_hides_the_loader():
    assert not (ROOT / "kernels" / "__init__.py").exists()
