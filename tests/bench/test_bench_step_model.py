"""The model of a decoding step: what it counts, and how its constants act."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from bench.trainer import step_model, step_time
from bench.trainer.models import model_configs
from bench.trainer.rollout import PROMPT_TOKENS
from bench.trainer.step_time import OPTIMISTIC, Node, Step
from iris_fast.models.janus import Janus

FULL = model_configs(torch.device("cuda"))["1B"]


def with_layers(count: int):
    return dataclasses.replace(FULL, decoder=dataclasses.replace(FULL.decoder, num_layers=count))


@pytest.fixture(scope="module")
def steps() -> dict[tuple[int, int], Step]:
    """By layers and rows."""
    return {
        (layers, rows): step_model.model_step(with_layers(layers), rows)
        for layers, rows in ((1, 16), (2, 16), (1, 256))
    }


@pytest.mark.parametrize("rows", [16, 256])
def test_memory_is_that_of_weights_and_live_entries(steps, rows):
    config = with_layers(1)
    with torch.device("meta"):
        janus = Janus(config)
    layer = janus.model.language_model.layers[0]
    read = [*layer.self_attn.parameters(), *layer.mlp.parameters()]
    read += janus.model.generation_head.parameters()
    weights = 2 * sum(p.numel() for p in read if p.dim() == 2)
    slot = 2 * 2 * config.decoder.num_kv_heads * config.decoder.head_dim
    # 8 samples of a group share a prompt, all unconditional rows share one.
    prefixes = rows // 2 // 8 + 1
    live = rows * (config.image_tokens / 2 + 1) + prefixes * (PROMPT_TOKENS - 1)
    found = sum(node.dram for node in steps[1, rows].nodes)
    assert found == pytest.approx(weights + slot * live, rel=1e-3)


def test_every_layer_adds_the_same_kernels(steps):
    """Seven launches of few rows, all by programmatic dependent launch."""
    one, two = steps[1, 16].nodes, steps[2, 16].nodes
    assert len(two) - len(one) == 7
    assert sum(n.pdl for n in two) - sum(n.pdl for n in one) == 7
    assert all(node.dram >= 0 and node.l2 > 0 for node in two)


def test_a_step_takes_longer_than_its_floor_and_its_starts(steps):
    for step in steps.values():
        assert 0.3 < step.fraction < 1.0
        assert step.fraction < step_model.optimistic(step)
        assert 0 < step.idle_s < step.total_s  # memory delivers one byte at a time


def test_dependent_launch_and_early_fetching_save_time():
    first = Node("first", dram=0.0, l2=1e6, pdl=True, triton=True)
    fields = {"dram": 40e6, "l2": 40e6, "triton": True}
    plain, pdl = Node("second", **fields), Node("second", **fields, pdl=True)
    fetching = dataclasses.replace(pdl, early=4e6)
    times = [Step([first, node], 0.0).total_s for node in (plain, pdl, fetching)]
    assert times[0] - times[1] == pytest.approx(step_time.LAUNCH_S - step_time.PDL_S)
    saved = 4e6 / (step_time.TRITON_SHARE * step_time.COPY_RATE)
    assert times[1] - times[2] == pytest.approx(saved)
    endless = dataclasses.replace(pdl, early=40e6)  # while memory is idle, and no longer
    step = Step([first, endless], 0.0)
    assert step.idle_s == pytest.approx(step_time.PDL_S + step_time.LATENCY_S)
    after_torch = dataclasses.replace(first, triton=False)  # which does not start it early
    late = [Step([after_torch, node], 0.0).total_s for node in (pdl, fetching)]
    assert late[0] == late[1]


def test_few_programs_do_not_reach_the_bandwidth():
    many = Node("k", dram=1e8, l2=0.0, programs=1056, warps=8, in_flight=32768.0, triton=True)
    few = dataclasses.replace(many, programs=33)
    share = OPTIMISTIC.triton_share * step_time.COPY_RATE
    assert many.memory_s(OPTIMISTIC) == pytest.approx(1e8 / share, rel=0.01)
    rate = 33 * 32768.0 / OPTIMISTIC.latency_s
    assert few.memory_s(OPTIMISTIC) == pytest.approx(1e8 / rate, rel=0.01)


def test_the_command_prints_the_table_and_writes_json(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(step_model, "SEQUENCES", (16,))
    monkeypatch.setattr(step_model, "model_configs", lambda device: {"1B": with_layers(1)})
    out = tmp_path / "model.json"
    monkeypatch.setattr("sys.argv", ["step_model", "--model", "1B", "--json", str(out)])
    assert step_model.main() == 0
    assert "modelled, not measured" in capsys.readouterr().out
    assert '"fraction_of_floor"' in out.read_text()


def test_entries_that_are_not_live_are_fetched_in_vain():
    """In idle time only if that is long enough."""
    before = Node("n", 0.0, 8e6, pdl=True, triton=True)

    def seconds(early: float, useful: float) -> float:
        node = Node(
            step_time.ATTENTION, 1e9, 1e9, early=early, useful=useful, pdl=True, triton=True
        )
        return Step([before, node], 1.0).total_s

    bandwidth = step_time.TRITON_SHARE * step_time.COPY_RATE
    saved = 4.3e6 / bandwidth
    assert seconds(0.0, 1.0) - seconds(4.3e6, 1.0) == pytest.approx(saved)
    assert seconds(0.0, 1.0) - seconds(4.3e6, 0.5) == pytest.approx(saved / 2)
    assert seconds(2e7, 0.5) > seconds(4.3e6, 0.5)
    assert seconds(1e8, 0.5) > seconds(0.0, 1.0) + 30e6 / bandwidth


def test_early_bytes_are_those_of_programs_that_fit():
    """Next to the last wave of the kernel before, by registers or by shared memory."""
    node = Node("n", 1e8, 0.0, early=8e6, shared=64 << 10, pdl=True, triton=True)
    assert node.beside() == 3
    full = dataclasses.replace(node, shared=200 << 10)
    assert node.fitting(full) == 0.0
    half = dataclasses.replace(full, programs=66)  # of the multiprocessors
    assert node.fitting(half) == 1.0  # three programs on each of the others
    many = dataclasses.replace(node, programs=400)
    assert many.fitting(half) == pytest.approx(66 * 3 / 400)
    assert dataclasses.replace(many, fetching=99).fitting(half) == 1.0
    assert node.fitting(dataclasses.replace(full, programs=132 + 66)) == 1.0
    registers = dataclasses.replace(node, shared=0, warps=8, registers=255)
    assert node.fitting(registers) == 0.0
    assert node.fitting(dataclasses.replace(half, triton=False)) == 0.0


def test_a_norm_fetches_for_the_product_after_it():
    """While the product before, bound by the L2 cache, leaves memory idle; never more than that."""
    before = Node("before", dram=1e6, l2=60e6, pdl=True, triton=True)
    norm = Node("norm", dram=0.0, l2=1e6, pdl=True, triton=True)
    after = Node("after", dram=80e6, l2=0.0, early=4e6, pdl=True, triton=True)
    bandwidth = step_time.TRITON_SHARE * step_time.COPY_RATE

    def times(ahead: float) -> Step:
        fetching = dataclasses.replace(norm, ahead=ahead)
        return Step([before, fetching, after], 1.0)

    assert times(0.0).total_s - times(8e6).total_s == pytest.approx(8e6 / bandwidth)
    assert times(80e6).total_s == times(60e6).total_s > 80e6 / bandwidth
    assert times(80e6).idle_s > 0
    alone = Step([norm, dataclasses.replace(norm, ahead=8e6), after], 1.0)
    plain = Step([norm, norm, after], 1.0)  # without a product before, only as long as a norm takes
    assert 0 < plain.total_s - alone.total_s < 8e6 / bandwidth


def test_norms_of_a_step_fetch_weights_that_the_products_do_not(steps):
    nodes = steps[1, 16].nodes
    ahead = [node.ahead for node in nodes if node.name == "_add_rms_norm_kernel"]
    assert ahead == [16 * 512 * 128.0] * 2 + [0.0]
    assert not any(node.ahead for node in steps[1, 256].nodes)


def test_a_product_is_bound_by_the_cache_or_the_tensor_cores():
    machine = step_time.CAUTIOUS
    product = Node("n", 0.0, 1e8, 1e9, programs=132, triton=True)
    assert product.other_s(machine) == pytest.approx(1e8 / step_time.L2_RATE)
    few = dataclasses.replace(product, programs=33)  # each receives 3 MB through its port
    assert few.other_s(machine) == pytest.approx(1e8 / 33 / step_time.PORT_RATE)
    uneven = dataclasses.replace(product, operations=1e11, programs=172)
    seconds = 2 * 132 / 172 * 1e11 / step_time.MATRIX_RATE
    assert uneven.other_s(machine) == pytest.approx(seconds)


def test_products_use_the_multiprocessors_that_have_a_program(steps):
    """Query, key and value of 16 rows: 96 tiles."""
    first = next(node for node in steps[1, 16].nodes if node.name == step_model.LINEAR)
    assert first.programs == 96
    assert first.busiest == step_time.MULTIPROCESSORS / 96
    assert first.operations == 2 * 16 * 6144 * 2048
    assert first.l2 == 2 * (6144 * 2048 + 96 * 16 * 2048 + 16 * 6144)
