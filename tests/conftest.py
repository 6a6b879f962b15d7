"""Shared by all tests: markers, fixtures, and a small training run."""

from __future__ import annotations

import gc
import importlib.util
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

if not torch.cuda.is_available():
    # Before Triton is imported: without a GPU its kernels run in its interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from small_runs import make_trace, quick
from torch.distributed.checkpoint.logger import _dcp_logger as dcp_logger

from iris_fast import distributed
from iris_fast.distributed import Ranks
from iris_fast.records import Prompt, Rollout

# Three prompts, so that a run of a few steps reaches the end of the file within a step.
THREE = "a red cube\na blue ball left of a green cone\ntwo yellow pyramids\n"
# What only some tests import: where one is missing, files that need it are skipped.
OPTIONAL = (
    "cut_cross_entropy", "datasets", "docstring_parser", "jsonargparse", "kernels", "liger_kernel",
    "matplotlib", "peft", "torchao", "transformers", "trl",
)  # fmt: skip
# Of the tests for a GPU, first what everything else depends on, last what takes longest.
GPU_FIRST = (
    "kernels/test_token_stats", "kernels/", "test_engine", "models/", "test_optimizer",
    "test_compiled",
)  # fmt: skip
ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared"


def pytest_configure() -> None:
    hypothesis.settings.register_profile("project", deadline=None, derandomize=True)
    hypothesis.settings.load_profile("project")  # no deadline: time per example is not tested
    torch.set_num_threads(1)  # one thread per pytest worker
    # It logs every tensor of every checkpoint, which floods the report of a failing test.
    dcp_logger.setLevel(logging.WARNING)
    logging.getLogger("torch.__trace").setLevel(logging.WARNING)  # every compiled graph


def installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # of a finder that hides it
        return False


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector):
    """Skip a file that imports an optional package which is not installed."""
    report = yield
    if report.failed and isinstance(collector, pytest.Module):
        text = str(report.longrepr)
        missing = [n for n in OPTIONAL if f"No module named '{n}" in text and not installed(n)]
        if missing:
            report.outcome = "skipped"
            report.longrepr = (str(collector.path), 0, f"Skipped: needs {missing[0]}")
    return report


def gpu_order(item: pytest.Item) -> int:
    """The place of a test among those for a GPU; 0 for all others."""
    if "gpu" not in item.keywords:
        return 0
    path = str(item.path.relative_to(Path(__file__).parent))
    places = (place for place, start in enumerate(GPU_FIRST) if path.startswith(start))
    return next(places, len(GPU_FIRST))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=gpu_order)
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if "browser" in item.keywords and not shutil.which("chromium"):
            item.add_marker(pytest.mark.skip(reason="needs chromium"))
        if "shared" in item.keywords and not SHARED.is_dir():
            item.add_marker(pytest.mark.skip(reason="needs ../shared"))


def pytest_collection_finish() -> None:
    """Training runs end with a garbage collection; exclude the imported modules from it."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # Triton's bindings would report it all as leaked


@pytest.fixture
def shared() -> Path:
    """The folder of real prompt files and fixture checkpoints."""
    if not SHARED.is_dir():
        pytest.skip("needs ../shared")
    return SHARED


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, which is the current directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ranks]:
    """A process group of one, for tests without sharded models."""
    monkeypatch.setattr(distributed.gc, "collect", lambda: 0)  # slow, and not needed
    with distributed.start("cpu", 60.0) as started:
        yield started


@pytest.fixture
def rollout() -> Rollout:
    """Two prompts, G = 2; 3, 1, 2 and 3 tokens of text, 4 of each image."""
    first, second = Prompt("a cube", {"n": 1}), Prompt("a ball", {"n": 2, "color": "red"})
    lengths = [3, 1, 2, 3]
    return Rollout(
        prompts=[first, first, second, second],
        sample_numbers=[10, 11, 12, 13],
        seed=42,
        cot_prompt_ids=[[1]] * 4,
        cot_ids=[[2] * length for length in lengths],
        cot_texts=["text"] * 4,
        truncated=[True, False, False, False],
        image_prompt_ids=[[1]] * 4,
        unconditional_prompt_ids=[[1]] * 4,
        codes_NI=torch.zeros(4, 4, dtype=torch.int64),
        text=make_trace(lengths, seed=0),
        image=make_trace([4] * 4, seed=1),
    )


@pytest.fixture
def prompts(here: Path) -> str:
    (here / "three.txt").write_text(THREE)
    return "three.txt"


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory) -> Path:
    """A run of 5 steps with checkpoints and sample grids. Read-only."""
    folder = tmp_path_factory.mktemp("run") / "run"
    from iris_fast.train import main  # needs jsonargparse, which a GPU machine may lack

    config = quick(folder, max_steps=5, save_steps=2, sample_steps=2, num_sample_prompts=3)
    assert main(config) == 0
    return folder
