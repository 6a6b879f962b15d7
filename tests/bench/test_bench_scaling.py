"""Measured ranks, and the model of larger clusters, checked by hand."""

import sys

import pytest
import torch

from bench.harness.measure import Bench
from bench.harness.results import write
from bench.trainer import scaling
from bench.trainer.models import model_configs
from bench.trainer.scaling import Cluster, Work
from bench.trainer.step import Phases

WORK = Work(
    blocks=100_000_000, outside=20_000_000, trained=110_000_000, layers=10, tensors=50,
    micro_batches=2,
)  # fmt: skip
CLUSTER = Cluster(gpus_per_node=8, node_bytes_per_s=1e9, network_bytes_per_s=0.5e9, hop_s=1e-3)
ALONE = Phases(rollout=3.0, training=2.0)


def test_what_fsdp_communicates():
    """A micro-batch gathers 2 bytes x (300 M + 20 M) and reduces 4 x 110 M: 1.08 GB, two of them
    2.16 GB, in 2 x 42 rings."""
    assert WORK.fsdp_s(4, CLUSTER) == pytest.approx(2.16 * 3 / 4 + 84 * 3e-3)
    assert WORK.fsdp_s(16, CLUSTER) == pytest.approx(2.16 * 15 / 16 / 0.5 + 84 * 15e-3)
    assert WORK.copy_s(4, CLUSTER) == pytest.approx(0.48 * 3 / 4 + 50 * 3e-3)


@pytest.mark.parametrize(
    ("ranks", "least", "most"),
    [
        (1, 5.0, 5.0),
        (4, 3 + 2 + 0.51, 5 + 1.872 + 0.51),  # FSDP's 1.872 s fit behind 2 s of training
        (16, 3 + 5.31 + 1.65, 5 + 5.31 + 1.65),  # 5.31 s do not
    ],
)
def test_a_step_on_more_gpus(ranks, least, most):
    assert scaling.model_step(ALONE, WORK, ranks, CLUSTER) == pytest.approx((least, most))


def test_the_network_counts_from_the_second_node_on():
    assert CLUSTER.seconds(8e9, 0, 8) == pytest.approx(7.0)
    assert CLUSTER.seconds(9e9, 0, 9) == pytest.approx(16.0)


def test_parameters_are_counted_from_the_model():
    """4 blocks, and heads and embeddings of 512 words and 256 codes; the image's are frozen."""
    work = Work.of(model_configs(torch.device("cpu"))["tiny"], micro_batches=4)
    frozen = 256 * 8 + (8 * 128 + 128 + 128 * 128 + 128) + (128 * 128 + 128 + 128 * 256 + 256)
    assert work.blocks == 803_840
    assert work.trained == 803_840 + 2 * 512 * 128 + 128
    assert work.blocks + work.outside == work.trained + frozen
    assert (work.layers, work.tensors, work.micro_batches) == (4, 4 * 9 + 3 + 9, 4)


def test_the_table_shows_a_range_and_its_efficiency():
    table = scaling.model_table(ALONE, WORK, [4, 16], CLUSTER)
    assert "| 4 | 1.87 | 0.51 | 5.51 to 7.38 | 68% to 91% |" in table
    assert "| 16 | 5.31 | 1.65 | 9.96 to 12 | 42% to 50% |" in table


def test_rows_of_ranks_are_compared_with_one(monkeypatch):
    seconds = {1: Phases(1.0, 1.0), 2: Phases(1.0, 1.5)}
    monkeypatch.setattr(scaling, "measure_ranks", seconds.get)
    rows = list(scaling.rows(Bench(torch.device("cpu"))))
    found = [(r["shape"]["ranks"], r["unit"], r["value"], r["fraction_of_floor"]) for r in rows]
    assert found == [
        (1, "s", 2.0, 1.0), (1, "images/s", 4.0, 1.0),
        (2, "s", 2.5, 0.8), (2, "images/s", 6.4, 0.8),
    ]  # fmt: skip
    assert scaling.rank_counts(1) == [1]
    assert scaling.rank_counts(7) == [1, 2, 4]


def test_two_ranks_are_measured():
    phases = scaling.measure_ranks(2)
    assert phases.rollout > 0 and phases.training > 0


def test_a_rank_that_fails_is_reported(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match=r"ranks exited with \[1, 1\]"):
        scaling.measure_ranks(2)


def test_the_model_starts_from_the_newest_step_of_a_gpu(tmp_path, monkeypatch, capsys):
    def row(metric, value):
        return {"suite": "step", "metric": metric, "value": value, "shape": {"model": "1B"}}

    def save(name, driver, date, *values):
        head = {"driver": driver, "date": date}
        measured = [row("rollout", values[0]), row("training", values[1])]
        write(tmp_path / "bench" / "results" / name, {"head": head, "rows": measured})

    (tmp_path / "bench" / "results").mkdir(parents=True)
    monkeypatch.setattr(scaling, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["scaling", "--model_only"])
    save("cpu.json", None, "2026-04", 9.0, 9.0)
    assert scaling.main() == 0
    assert "no step measured on a GPU" in capsys.readouterr().out
    save("old.json", "580", "2026-01", 5.0, 5.0)
    save("new.json", "580", "2026-02", 2.0, 1.0)
    save("failed.json", "580", "2026-03", None, None)
    assert scaling.main() == 0
    output = capsys.readouterr().out
    assert "2 s of rollout, 1 s of training" in output
    assert "| 1 | 0 | 0 | 3 to 3 | 100% to 100% |" in output
