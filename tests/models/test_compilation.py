"""Blocks compiled one by one: the same numbers, and no new graph per layer, length or batch."""

from __future__ import annotations

import inspect
import shutil
from dataclasses import replace

import attention_fakes
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.nn.attention.varlen import varlen_attn

from iris_fast.models import compilation
from iris_fast.models.attention import PackedAttention
from iris_fast.models.compilation import compile_blocks
from iris_fast.models.decoder import Decoder, DecoderConfig

SIZES = DecoderConfig(
    vocab_size=64, hidden_size=48, intermediate_size=80, num_layers=10, num_heads=6,
    num_kv_heads=2, head_dim=8,
)  # fmt: skip
# Padded and not, few sequences and many, one alone.
BATCHES = ([9, 4, 7], [3, 12, 6, 5], [8, 20], [5, 5, 5], [4, 4], [7], [9], [2, 17, 3, 4, 1, 1])


@pytest.fixture(autouse=True)
def _no_graphs():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def pair(layers: int = 10) -> tuple[Decoder, Decoder]:
    """A compiled decoder, and an eager one with the same weights."""
    eager = Decoder(replace(SIZES, num_layers=layers))
    compiled = Decoder(eager.config)
    compiled.load_state_dict(eager.state_dict())
    compile_blocks(compiled)
    return compiled, eager


def outcome(decoder: Decoder, lengths: list[int], implementation: str) -> dict[str, torch.Tensor]:
    """Hidden rows of a batch, and every gradient of a random weighting of them."""
    generator = torch.Generator().manual_seed(sum(lengths))
    rows = torch.randn(sum(lengths), SIZES.hidden_size, generator=generator)
    upstream = torch.randn(rows.shape, generator=generator)
    positions = torch.cat([torch.arange(length) for length in lengths])
    attention = PackedAttention(lengths, implementation=implementation)
    decoder.zero_grad()
    hidden = decoder(rows.requires_grad_(), positions, attention)
    hidden.backward(upstream)
    named = decoder.named_parameters()
    return {
        "hidden": hidden.detach(),
        "rows": rows.grad,
        **{n: p.grad.clone() for n, p in named if p.grad is not None},
    }


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        scale = wanted.abs().max().item()
        assert (found[name] - wanted).abs().max() <= 1e-5 * scale + 1e-7, name


def test_compiled_blocks_share_their_graphs(monkeypatch):
    """One graph for all layers and any number of tokens; others where nothing is padded, and for a
    sequence alone."""
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(compilation, "BACKEND", counter)
    compiled, eager = pair()
    graphs = []
    for lengths in BATCHES:
        assert_same(outcome(compiled, lengths, "sdpa"), outcome(eager, lengths, "sdpa"))
        graphs.append(counter.frame_count)
    assert graphs == [1, 1, 1, 2, 2, 3, 3, 3]
    assert not counters["graph_break"]


@pytest.mark.parametrize("name", ["flash_attention_2", "xformers"])
def test_packages_stay_outside_the_graphs(name, monkeypatch):
    """Blocks are cut at the call, and still compiled once for all layers."""
    calls = attention_fakes.install(name, monkeypatch)
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(compilation, "BACKEND", counter)
    compiled, eager = pair()
    graphs = []
    for lengths in BATCHES:
        assert_same(outcome(compiled, lengths, name), outcome(eager, lengths, name))
        graphs.append(counter.frame_count)
    assert len(set(graphs)) == 1
    assert len(calls) == 2 * SIZES.num_layers * len(BATCHES)


def test_torchs_own_varlen_is_part_of_the_graph(monkeypatch):
    """With the real function, which a CPU cannot run: it is traced, as causal."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph.graph)
        return lambda *_: (torch.zeros_like(rows),)

    monkeypatch.setattr(compilation, "BACKEND", backend)
    compiled, _ = pair()
    for lengths in BATCHES:
        rows, positions = torch.randn(sum(lengths), 48), torch.arange(sum(lengths))
        with torch.no_grad():
            compiled(rows, positions, PackedAttention(lengths, implementation="varlen"))
    (graph,) = graphs
    assert not counters["graph_break"]
    (call,) = (node for node in graph.nodes if "_varlen_attn" in str(node.target))
    heads = [x.meta["example_value"].shape[1:] for x in call.args[:3]]
    shares_heads = "enable_gqa" in inspect.signature(varlen_attn).parameters  # from torch 2.12 on
    assert heads == [(6, 8), *[(2, 8) if shares_heads else (6, 8)] * 2]
    assert call.args[7] is True  # is_causal


@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
def test_inductor_computes_the_same():
    compiled, eager = pair(layers=2)
    for lengths in BATCHES[:2]:
        assert_same(outcome(compiled, lengths, "sdpa"), outcome(eager, lengths, "sdpa"))
    assert counters["stats"]["unique_graphs"] == 1
