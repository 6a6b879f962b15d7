"""What a rank holds in memory while the models are built: mapped files, and one block at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from small_runs import quick
from torch import nn
from torch.distributed.tensor import DTensor

from iris_fast import distributed
from iris_fast.grpo import fsdp
from iris_fast.grpo.fsdp import full
from iris_fast.grpo.lora import BASE, is_adapter
from iris_fast.grpo.policy import build_models
from iris_fast.models.pretrained.load import load_janus
from iris_fast.models.pretrained.save import save_janus
from iris_fast.preflight.dry_run import open_checked
from iris_fast.tiny import PROMPTS_FILE
from iris_fast.tiny.build import build_random_tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A model whose weights are stored in bfloat16."""
    return save_janus(build_random_tiny(dtype=torch.bfloat16), tmp_path_factory.mktemp("m") / "bf")


def addresses(model) -> dict[str, int]:
    return {name: p.data_ptr() for name, p in model.named_parameters()}


def mapped(folder: Path) -> list[range]:
    """Where this process has files of `folder` in its address space."""
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if str(folder) in line:
            start, stop = (int(n, 16) for n in line.split()[0].split("-"))
            found.append(range(start, stop))
    return found


def test_without_a_dtype_the_weights_stay_in_their_file(folder):
    opened, copied = load_janus(folder, None), load_janus(folder, torch.bfloat16)
    where = mapped(folder)
    assert all(any(a in span for span in where) for a in addresses(opened.model).values())
    assert not any(any(a in span for span in where) for a in addresses(copied.model).values())
    for mine, theirs in zip(opened.model.parameters(), copied.model.parameters(), strict=True):
        assert mine.dtype == torch.bfloat16
        assert torch.equal(mine, theirs)
    assert {p.dtype for p in opened.vq.parameters()} == {torch.float32}


class Units(list):
    """For each unit, when it is about to be cut: bytes of `policy` that are whole copies of what is
    `in_file`, and bytes of the unit's own."""

    def record(self, unit: nn.Module) -> None:
        whole = {p for p in self.policy.parameters() if not isinstance(p, DTensor)}
        copies = {p for p in whole if p.data_ptr() not in self.in_file}
        own = copies & set(unit.parameters())
        self.append((sum(p.nbytes for p in copies), sum(p.nbytes for p in own)))

    def watch(self, policy: nn.Module) -> None:
        self.policy, self.in_file = policy, set(addresses(policy).values())


@pytest.fixture
def units(monkeypatch) -> Units:
    found, cut = Units(), fsdp.fully_shard

    def recorded(unit, **options):
        found.record(unit)
        return cut(unit, **options)

    monkeypatch.setattr(fsdp, "fully_shard", recorded)
    return found


SETTINGS = {"float32": {}, "bf16": {"bf16": True}, "adapters": {"bf16": True, "use_peft": True}}


@pytest.mark.parametrize("kind", SETTINGS)
def test_a_rank_copies_one_block_at_a_time(folder, units, kind):
    config = quick("unused", model=str(folder), prompts=str(PROMPTS_FILE), **SETTINGS[kind])
    adapted = kind == "adapters"
    master = torch.bfloat16 if adapted else torch.float32
    compute = torch.bfloat16 if config.bf16 else torch.float32
    with distributed.start("cpu", 60.0) as ranks:
        inputs = open_checked(config, ranks, Path("unused"))
        units.watch(inputs.loaded.model)
        stored = {name: p.detach().clone() for name, p in inputs.loaded.model.named_parameters()}
        models = build_models(inputs, config, ranks)
        adapters = {n: p for n, p in models.policy.named_parameters() if is_adapter(n)}
        rest = sum(p.nbytes for p in adapters.values())
        if config.bf16:
            blocks = models.policy.model.language_model.layers
            assert len(units) == (len(blocks) + 1) * (2 - adapted)
            assert all(copies <= own + rest for copies, own in units)
            assert max(own for _, own in units) > 0
        else:  # one rank in float32 is not sharded: its weights are copied one by one
            assert not units
        for name, p in models.policy.named_parameters():
            if name not in adapters:
                assert p.dtype == master
                assert torch.equal(full(p), stored[name.replace(BASE, ".")].to(master)), name
        for name, p in models.sampler.janus.named_parameters():
            assert torch.equal(p, stored[name].to(compute)), name
        for name, p in [] if adapted else models.reference.named_parameters():
            assert torch.equal(full(p), stored[name].to(compute)), name
        del models, inputs, units.policy, p
    now = load_janus(folder, None).model  # nothing was written to the file
    assert all(torch.equal(p, stored[name]) for name, p in now.named_parameters())
