"""Weak scaling of a GRPO step, where each rank adds its own prompts: measured, and modelled for
larger clusters.

    python -m bench.trainer.scaling [--rollout_s S --training_s S] [--gpus 8 64]
                                    [--network_bytes_per_s R]

Measured (also by `python -m bench.run --suite scaling`): the step of bench/trainer/step.py on 1 and
2 ranks; on GPUs, on up to as many ranks as there are GPUs. The floor is the step on one rank, so
that the fraction of the floor is the parallel efficiency.

Modelled, from a step measured on one GPU, for W GPUs with k micro-batches:

    F(W)    = k (b (3 B + O) + 4 T) (W-1)/W / bandwidth(W)  +  k (4 layers + 2) (W-1) hop
    C(W)    = 4 (B + O) (W-1)/W / bandwidth(W)  +  tensors (W-1) hop
    most    = rollout + training + F(W) + C(W)           no communication overlaps computation
    least   = rollout + max(training, F(W)) + C(W)       all of FSDP's that can, does

B parameters in blocks, O outside of them, T trained, b bytes per parameter in the compute dtype.
F is FSDP's communication: in every micro-batch a block is gathered for the forward pass, for the
backward pass and for the reference, the other parameters once, and gradients are reduced in
float32. C is the sampler's copy of the weights, gathered in float32 tensor by tensor. A gather or a
reduction is a ring: each GPU sends (W-1)/W of the bytes, in W-1 hops. Ranks sample independently,
so the rollout communicates nothing; waiting for the slowest rank is not modelled.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from bench.harness.measure import Bench
from bench.harness.results import load_all
from bench.harness.rows import Measured, Row, make_row
from bench.harness.tables import table
from bench.trainer import step
from bench.trainer.models import model_configs
from bench.trainer.step import CPU_SIZE, GPU_SIZE, Phases
from iris_fast import distributed
from iris_fast.distributed import Ranks
from iris_fast.models.janus import Janus, JanusConfig

SUITE = "scaling"
ROOT = Path(__file__).parent.parent.parent
TIMEOUT_S = 1800.0


# --- Measured -------------------------------------------------------------------------------------


def rows(bench: Bench) -> Iterator[Row]:
    gpu = bench.device.type == "cuda"
    model, size = ("1B", GPU_SIZE) if gpu else ("tiny", CPU_SIZE)
    dtype = torch.bfloat16 if gpu else torch.float32
    if not bench.models([model]) or not bench.wants(f"GRPO, own prompts {model}"):
        return
    if gpu and torch.cuda.device_count() == 1:
        return  # the suite `step` measures that
    alone = None
    for ranks in rank_counts(torch.cuda.device_count() if gpu else 2):
        found = Measured(sum(measure_ranks(ranks)))
        alone = alone or found.value
        shape = {"model": model, "ranks": ranks, "P": size.prompts, "G": size.group}
        images = ranks * size.prompts * size.group
        yield make_row(SUITE, "GRPO, own prompts", shape, dtype, "step", "s", found, floor=alone)
        yield make_row(
            SUITE, "GRPO, own prompts", shape, dtype, "images", "images/s",
            found.inverse(images), floor=images / alone,
        )  # fmt: skip


def rank_counts(maximum: int) -> list[int]:
    """1, 2, 4, ... up to `maximum`."""
    return [1 << i for i in range(maximum.bit_length())]


def measure_ranks(ranks: int) -> Phases:
    """Start that many processes; median seconds of a step's phases on rank 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "bench.trainer.scaling", "--child"],
            env=os.environ | place | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        outputs = [process.communicate(timeout=TIMEOUT_S)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    codes = [process.returncode for process in processes]
    if any(codes):
        raise RuntimeError(f"ranks exited with {codes}; see their output above")
    return Phases(*json.loads(outputs[0].splitlines()[-1]))


def child() -> None:
    """One rank: a warm-up step, then timed steps; rank 0 prints the result."""
    with distributed.start("auto", TIMEOUT_S) as ranks:
        phases = _time_rank(ranks)
    if ranks.is_first:
        print(json.dumps(phases))
    distributed.leave(0)


def _time_rank(ranks: Ranks) -> Phases:
    """A separate function, because no sharded tensor may outlive the process group."""
    gpu = ranks.device.type == "cuda"
    model, size = ("1B", GPU_SIZE) if gpu else ("tiny", CPU_SIZE)
    janus = model_configs(ranks.device)[model]
    ours = step.Ours(janus, step.settings(size, gpu), ranks)
    ours.train(ours.rollout())
    return step.timed(Bench(ranks.device), ours, step.RUNS)[0]


# --- Modelled -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cluster:
    """Speed of collectives: bytes per second that a GPU sends, seconds per hop.

    Inside a node: NVLink 4 carries 450 GB/s per direction, of which NCCL's protocol leaves 370 to a
    ring (its author, nccl-tests #212). Between nodes: a ring enters a node through all of its eight
    400 Gb/s adapters, which reach at most 46 GB/s each (nccl-tests #290); measured were 320 GB/s
    for messages of gigabytes (nccl #1221) and 200 for an all-gather of 2 GB on 256 GPUs (nccl
    #1218). Messages here are about 0.1 GB, hence 200. The time per hop is a guess: 1 to 2 us inside
    a node, 5 to 10 us between nodes, where one hop in eight goes.
    """

    gpus_per_node: int = 8
    node_bytes_per_s: float = 370e9
    network_bytes_per_s: float = 200e9
    hop_s: float = 2.5e-6

    def seconds(self, size: float, collectives: int, ranks: int) -> float:
        """Seconds of that many ring collectives that move `size` bytes in total."""
        inside = ranks <= self.gpus_per_node
        rate = self.node_bytes_per_s if inside else self.network_bytes_per_s
        return size * (ranks - 1) / ranks / rate + collectives * (ranks - 1) * self.hop_s


@dataclass(frozen=True)
class Work:
    """What a rank communicates in a step, in numbers of parameters."""

    blocks: int
    outside: int
    trained: int
    layers: int
    tensors: int
    micro_batches: int
    compute_bytes: int = 2  # bfloat16

    @classmethod
    def of(cls, janus: JanusConfig, micro_batches: int) -> Work:
        """Counts of a model whose image head and image embeddings are frozen."""
        with torch.device("meta"):
            shapes = Janus(janus)
        counts = {name: p.numel() for name, p in shapes.named_parameters()}
        frozen = sum(count for name, count in counts.items() if ".generation_" in name)
        blocks = sum(p.numel() for p in shapes.model.language_model.layers.parameters())
        total = sum(counts.values())
        return cls(
            blocks=blocks,
            outside=total - blocks,
            trained=total - frozen,
            layers=janus.decoder.num_layers,
            tensors=len(counts),
            micro_batches=micro_batches,
        )

    def fsdp_s(self, ranks: int, cluster: Cluster) -> float:
        """F(W) of the module docstring."""
        gathered = self.compute_bytes * (3 * self.blocks + self.outside)
        size = self.micro_batches * (gathered + 4 * self.trained)
        return cluster.seconds(size, self.micro_batches * (4 * self.layers + 2), ranks)

    def copy_s(self, ranks: int, cluster: Cluster) -> float:
        """C(W) of the module docstring."""
        return cluster.seconds(4 * (self.blocks + self.outside), self.tensors, ranks)


def model_step(alone: Phases, work: Work, ranks: int, cluster: Cluster) -> tuple[float, float]:
    """Minimum and maximum seconds of a step on `ranks` GPUs, from a step on one."""
    fsdp, copy = work.fsdp_s(ranks, cluster), work.copy_s(ranks, cluster)
    least = alone.rollout + max(alone.training, fsdp) + copy
    return least, sum(alone) + fsdp + copy


def measured_on_gpu(folder: Path) -> Phases | None:
    """Phases of the newest step measured on a GPU; None if there is none."""
    for run in load_all(folder).values():
        values = {
            row["metric"]: row["value"]
            for row in run["rows"]
            if row["suite"] == step.SUITE and row["shape"].get("model") == "1B"
        }
        if run["head"]["driver"] and values.get("rollout") and values.get("training"):
            return Phases(values["rollout"], values["training"])
    return None


# --- The command ----------------------------------------------------------------------------------


def model_table(alone: Phases, work: Work, gpus: list[int], cluster: Cluster) -> str:
    """Markdown: seconds of a step, and its efficiency against W times one GPU's throughput."""
    lines = ["| GPUs | FSDP s | copy s | step s | efficiency |", "|---|---|---|---|---|"]
    for ranks in gpus:
        least, most = model_step(alone, work, ranks, cluster)
        communication = f"{work.fsdp_s(ranks, cluster):.3g} | {work.copy_s(ranks, cluster):.3g}"
        efficiency = f"{sum(alone) / most:.0%} to {sum(alone) / least:.0%}"
        lines.append(f"| {ranks} | {communication} | {least:.3g} to {most:.3g} | {efficiency} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rollout_s", type=float, help="on one GPU; default: measured")
    parser.add_argument("--training_s", type=float, help="on one GPU; default: measured")
    parser.add_argument(
        "--gpus", type=int, nargs="+", default=[1, 8, 64], help="numbers of GPUs to model"
    )
    for field in fields(Cluster):
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    parser.add_argument("--model_only", action="store_true", help="measure nothing here")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child()
    if (arguments.rollout_s is None) != (arguments.training_s is None):
        parser.error("--rollout_s, --training_s: only one is given; give both or neither")
    if not arguments.model_only:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        print(table(rows(Bench(device))) + "\n")
    if arguments.rollout_s is None:
        alone = measured_on_gpu(ROOT / "bench" / "results")
    else:
        alone = Phases(arguments.rollout_s, arguments.training_s)
    if alone is None:
        print("no step measured on a GPU to model from; give --rollout_s and --training_s")
        return 0
    janus = model_configs(torch.device("cuda"))["1B"]
    work = Work.of(janus, GPU_SIZE.prompts // GPU_SIZE.batch)
    cluster = Cluster(**{field.name: getattr(arguments, field.name) for field in fields(Cluster)})
    print(f"1B, modelled from {alone.rollout:.3g} s of rollout, {alone.training:.3g} s of training")
    print(model_table(alone, work, arguments.gpus, cluster))
    return 0


if __name__ == "__main__":
    sys.exit(main())
