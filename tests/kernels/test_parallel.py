"""Rows shared among threads: the same results, and torch's own settings unchanged."""

import pytest
import torch
from iris_kernels import _parallel, guided_sample, token_stats


@pytest.fixture
def busy(monkeypatch):
    """A machine that is busy, with two threads, where even a few rows are shared."""
    monkeypatch.setenv("IRIS_KERNELS_BACKEND", "torch")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    monkeypatch.setattr(_parallel, "SHARED_ELEMENTS", 1)
    monkeypatch.setattr(_parallel, "is_busy", lambda: True)
    yield monkeypatch
    torch.set_num_threads(before)


def case(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(rows, 777, generator=generator) * 4
    return logits, torch.randint(777, (rows,), generator=generator)


def test_rows_are_shared_among_threads_that_run_alone(busy):
    parts = _parallel.share_rows(lambda part: (part, torch.get_num_threads()), 5, 777)
    assert parts == [(slice(0, 2), 1), (slice(2, 5), 1)]
    assert torch.get_num_threads() == 2
    busy.setattr(_parallel, "is_busy", lambda: False)
    assert _parallel.share_rows(lambda part: part, 5, 777) == [slice(0, 5)]


@pytest.mark.parametrize("inference", [False, True])
def test_results_are_the_same_bit_for_bit(busy, inference):
    logits, token_ids = case(9)
    uniform = torch.linspace(0, 0.99, 9)

    def results() -> list[torch.Tensor]:
        found = []
        if not inference:
            leaf = logits.clone().requires_grad_()
            stats = token_stats(leaf, token_ids, temperature=0.7)
            (stats.logprob + stats.nsc * 2 - stats.entropy).sum().backward()
            found += [*stats, leaf.grad]
        with torch.inference_mode(inference):
            found += token_stats(logits, token_ids)
            sampled = guided_sample(logits, logits.flip(0), uniform, cfg_weight=3.0)
            return [*found, sampled.token_ids, *sampled.conditional, *sampled.guided]

    shared = results()
    busy.setattr(_parallel, "is_busy", lambda: False)
    for a, b in zip(shared, results(), strict=True):
        assert torch.equal(a, b)


def test_an_error_in_a_thread_reaches_the_caller(busy):
    def fail(part: slice) -> None:
        raise ValueError(f"part {part.start}")

    with pytest.raises(ValueError, match="part 0"):
        _parallel.share_rows(fail, 4, 777)
