from pathlib import Path

import pytest
import torch

from iris_fast.models.pretrained.save import save_janus
from iris_fast.tiny import build_random_tiny

FIXTURES = Path(__file__).resolve().parents[3] / "shared" / "fixtures"


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """The folder of the random checkpoints in the two real layouts."""
    if not FIXTURES.is_dir():
        pytest.skip(f"no fixture checkpoints: {FIXTURES} is absent")
    return FIXTURES


@pytest.fixture(scope="session")
def tiny():
    """Read-only: a test that changes weights builds its own."""
    return build_random_tiny(seed=3)


@pytest.fixture(scope="session")
def tiny_folders(tiny, tmp_path_factory) -> dict[str, Path]:
    """The tiny model in both layouts; read-only."""
    folder = tmp_path_factory.mktemp("tiny")
    return {
        layout: save_janus(tiny, folder / layout, layout) for layout in ("original", "transformers")
    }


@pytest.fixture(autouse=True)
def _same_every_time():
    """A fixed seed, and one thread: for these small models more threads are slower."""
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
