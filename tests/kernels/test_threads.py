"""On a busy machine the torch paths run on one thread: same results, settings restored."""

import pytest
import torch
from iris_kernels import _threads, guided_sample, token_stats


@pytest.fixture
def two_threads(monkeypatch):
    monkeypatch.setenv("IRIS_KERNELS_BACKEND", "torch")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("busy", "threads"), [(True, 1), (False, 2)])
def test_operations_run_on_one_thread_if_busy(busy, threads, two_threads, monkeypatch):
    monkeypatch.setattr(_threads, "is_busy", lambda: busy)
    with pytest.raises(KeyError), _threads.alone_if_busy(torch.zeros(1)):
        assert torch.get_num_threads() == threads
        raise KeyError
    assert torch.get_num_threads() == 2


def test_busy_is_a_load_of_twice_the_number_of_cores(monkeypatch):
    monkeypatch.setattr(_threads.os, "cpu_count", lambda: 4)
    for load, busy in ((7.9, False), (8.1, True)):
        monkeypatch.setattr(_threads.os, "getloadavg", lambda load=load: (load, 0.0, 0.0))
        assert _threads.is_busy() == busy


def test_results_are_the_same_bit_for_bit(two_threads, monkeypatch):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(90, 7770, generator=generator) * 4
    token_ids = torch.randint(7770, (90,), generator=generator)
    uniform = torch.rand(90, generator=generator)
    results = []
    for busy in (True, False):
        monkeypatch.setattr(_threads, "is_busy", lambda busy=busy: busy)
        leaf = logits.clone().requires_grad_()
        stats = token_stats(leaf, token_ids, temperature=0.7)
        (stats.logprob + stats.nsc * 2 - stats.entropy).sum().backward()
        sampled = guided_sample(logits, logits.flip(0), uniform, cfg_weight=3.0)
        results.append([*stats, leaf.grad, sampled[0], *sampled.conditional, *sampled.guided])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
