"""The counted work of a training pass: single operations by hand, and what fused blocks save."""

import json

import torch

from bench.trainer import counted_work
from bench.trainer.counted_work import CountedWork, counted, main, size, summary


def test_operations_and_bytes_of_single_calls():
    x, y = (torch.empty(6, 4, dtype=torch.bfloat16) for _ in range(2))
    row, rows = torch.empty(4, dtype=torch.bfloat16), torch.tensor([0, 5, 5])
    weight = torch.empty(8, 4, dtype=torch.bfloat16)
    with CountedWork(attention=0.0) as mode:
        x @ weight.t()
        torch.addmm(torch.empty(8, dtype=torch.bfloat16), x, weight.t())
        x.add_(y)
        x * row.expand(6, 4)
        x.float()
        x.index_select(0, rows)
        y.zero_()
        y.copy_(x)
        x.view(4, 6)
    work = mode.work
    assert work.operations == {"products": 2 * (2 * 6 * 8 * 4)}
    assert dict(work.bytes) == {
        "add_": 3 * 48,
        "mul": 2 * 48 + 8,
        "_to_copy": 48 + 96,
        "index_select": 2 * 24 + 24,
        "zero_": 48,
        "copy_": 2 * 48,
    }
    assert size(row.expand(6, 4)) == 8


def test_a_pass_of_1b_moves_at_most_400_gb_where_the_modules_move_1180():
    """Everything is proportional to the tokens, besides the weights' gradients."""
    tokens = 64 * 630
    (fused, _), (modules, _) = (counted("1B", tokens, f, False) for f in (True, False))
    assert fused.operations == modules.operations
    blocks = 24 * (4 * 2048**2 + 3 * 2048 * 5632)
    assert 1.0 <= fused.operations["products"] / (6 * blocks * tokens) < 1.01
    assert fused.operations["attention"] == 24 * 6 * 630**2 * 2048 * 64
    assert fused.bytes.total() <= 400e9
    assert 1150e9 <= modules.bytes.total() <= 1200e9
    # Per layer and token, in elements of the hidden width and of the MLP's.
    element = 2 * 24 * tokens
    assert fused.bytes["silu_mul_backward"] == element * 5 * 5632
    assert fused.bytes["silu_mul"] == element * 3 * 5632
    assert fused.bytes["add"] == element * 6 * 2048


def test_recomputation_costs_time_and_no_useful_operations(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["x", "--model", "1B", "--tokens", "630", "--blocks", "fused",
                                     "--json", str(tmp_path / "out.json")])  # fmt: skip
    before = counted_work.decoder.runs_fused
    main()
    text = (tmp_path / "out.json").read_text()
    assert text.startswith("[\n")
    (once,) = json.loads(text)
    twice = summary("1B", 630, True, True)
    assert (once["recomputed"], twice["recomputed"]) == (False, True)
    # A third more, without the last product of a block, whose output backward does not read.
    assert twice["tflop"]["products"] > 1.25 * once["tflop"]["products"]
    assert once["modelled_mfu"] > 1.15 * twice["modelled_mfu"]
    assert twice["gb"] > once["gb"]
    assert counted_work.decoder.runs_fused is before
