"""The C++ libraries: the same tokens with every instruction set, the same rows in every batch."""

from pathlib import Path

import pytest
import torch
from iris_kernels import cpp, guided_sample, token_stats

FOLDER = Path(cpp.__file__).parent
CAPABILITIES = ("AVX2", "AVX512")


def libraries() -> dict[str, Path]:
    """Those that were compiled and that this CPU can run."""
    best = torch.backends.cpu.get_cpu_capability()
    runnable = CAPABILITIES[: CAPABILITIES.index(best) + 1] if best in CAPABILITIES else ("base",)
    found = {name: list(FOLDER.glob(f"_{name.lower()}.*")) for name in runnable}
    return {name: paths[0] for name, paths in found.items() if paths}


@pytest.fixture
def use(monkeypatch):
    """Switch to the library of an instruction set."""
    if not libraries():
        pytest.skip("the C++ kernels are not compiled")
    monkeypatch.setenv("IRIS_KERNELS_BACKEND", "cpp")

    def switch(path: Path) -> None:
        loaded = cpp._load(path)
        monkeypatch.setattr(cpp, "library", lambda: loaded)

    return switch


@pytest.mark.parametrize("V", [3, 257, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_are_those_of_the_torch_path(V, dtype, use, monkeypatch):
    generator = torch.Generator().manual_seed(V)
    cond, uncond = (torch.randn(500, V, generator=generator).mul(3).to(dtype) for _ in range(2))
    uniform = torch.rand(500, generator=generator)
    settings = {"cfg_weight": 3.0, "temperature": 0.7}
    found = {}
    for name, path in libraries().items():
        use(path)
        found[name] = guided_sample(cond, uncond, uniform, **settings).token_ids
    monkeypatch.setenv("IRIS_KERNELS_BACKEND", "torch")
    expected = guided_sample(cond, uncond, uniform, **settings).token_ids
    for name, tokens in found.items():
        assert torch.equal(tokens, expected), name


@pytest.mark.parametrize("threads", [1, 2])
def test_rows_do_not_depend_on_threads_and_other_rows(threads, use):
    logits = torch.randn(64, 1000, generator=torch.Generator().manual_seed(0)) * 4
    token_ids = torch.arange(64)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for path in libraries().values():
            use(path)
            whole = token_stats(logits, token_ids)
            for row in (0, 31, 63):
                alone = token_stats(logits[row : row + 1], token_ids[row : row + 1])
                for a, b in zip(alone, whole, strict=True):
                    assert torch.equal(a, b[row : row + 1])
    finally:
        torch.set_num_threads(before)


def test_a_missing_library_is_none(monkeypatch):
    monkeypatch.setattr(cpp, "EXTENSION_SUFFIXES", [".nothing"])
    assert cpp.library.__wrapped__() is None
