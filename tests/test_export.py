"""`python -m iris_fast.export`: a run's weights as a model folder that others open."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from commands import run
from small_runs import quick, tensors, tree

from iris_fast.export import export
from iris_fast.models.attention import PackedAttention
from iris_fast.models.pretrained.load import load_janus
from iris_fast.tiny import build_tiny
from iris_fast.train import train


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run whose weights have changed. Read-only."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    train(quick(folder, save_steps=1, train_image_head=True))
    return folder


def policy_weights(run_folder: Path, step: int = 2) -> dict[str, torch.Tensor]:
    prefix = "policy."
    stored = tensors(run_folder, step).items()
    return {n.removeprefix(prefix): t for n, t in stored if n.startswith(prefix)}


@pytest.mark.parametrize("layout", ["transformers", "original"])
def test_an_export_opens_with_the_weights_of_the_newest_checkpoint(trained, here, layout):
    export(trained, here / "out", layout, "float32")
    opened = load_janus(here / "out")
    assert opened.layout == layout
    expected = policy_weights(trained)
    state = opened.model.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], expected[name]) for name in state)
    untrained = build_tiny()
    head = "model.generation_head.vision_head.weight"
    assert not torch.equal(state[head], untrained.model.state_dict()[head])
    for name, tensor in untrained.vq.state_dict().items():
        assert torch.equal(opened.vq.state_dict()[name], tensor)
    assert opened.tokenizer.encode("a red cube") == untrained.tokenizer.encode("a red cube")


def test_transformers_opens_the_export_with_the_same_logits(trained, here):
    transformers = pytest.importorskip("transformers")
    export(trained, here / "out", "transformers", "float32")
    theirs, report = transformers.JanusForConditionalGeneration.from_pretrained(
        here / "out", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    ours = load_janus(here / "out")
    ids = torch.tensor([ours.tokenizer.encode("a red cube")])
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits[0]
        hidden = ours.model.hidden_states(
            ours.model.embed_text(ids[0]),
            torch.arange(ids.shape[1]),
            PackedAttention([ids.shape[1]]),
        )
        torch.testing.assert_close(ours.model.text_logits(hidden), expected, rtol=0, atol=5e-5)


def test_the_command_writes_bfloat16_in_the_transformers_layout(trained, here):
    finished = run("iris_fast.export", trained, "out", cwd=here)
    assert (finished.code, finished.err) == (0, "")
    assert "step_00002 written to out (transformers layout, bfloat16)" in finished.out
    expected = policy_weights(trained)
    for name, tensor in load_janus(here / "out").model.state_dict().items():
        assert torch.equal(tensor, expected[name].bfloat16().float()), name


def test_an_export_can_be_trained_and_generated_with(trained, here):
    export(trained, here / "out", "original", "float32")
    (here / "p.txt").write_text("a cube\n")
    train(quick("run", model="out", prompts="p.txt", max_steps=1))
    words = ["--model", "out", "--prompts", "p.txt", "--image_token_num_per_image", "4"]
    assert run("iris_fast.generate", *words, cwd=here).code == 0


def test_a_damaged_newest_checkpoint_is_skipped_with_a_warning(trained, here):
    shutil.copytree(trained, here / "run")
    (here / "run" / "checkpoints" / "step_00002" / "state.json").write_text("{}")
    finished = run("iris_fast.export", "run", "out", "--dtype", "float32", cwd=here)
    assert finished.code == 0
    assert "warning: checkpoint run/checkpoints/step_00002 is skipped" in finished.error_line
    expected = policy_weights(trained, step=1)
    state = load_janus(here / "out").model.state_dict()
    assert all(torch.equal(state[name], expected[name]) for name in state)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["absent", "out"], "absent/config.yaml cannot be read (No such file"),
        (["empty", "out"], "empty has no valid checkpoint"),
        (["odd", "out"], "odd/config.yaml has no settings in it"),
        (["run", "full"], "full exists already"),
        (["run", "file/out"], "cannot write file/out"),
        (["run", "out", "--layout", "hf"], "hf"),
        (["run"], "target"),
        (["run", "out", "--dtpye", "float32"], "--dtpye"),
    ],
)
def test_errors_are_one_line_and_change_nothing(trained, here, words, message):
    (here / "run").symlink_to(trained)
    (here / "file").write_text("mine")
    for folder in ("empty", "odd", "full"):
        (here / folder).mkdir()
    (here / "empty" / "config.yaml").write_text("model: tiny\n")
    (here / "odd" / "config.yaml").write_text("- a\n")
    (here / "full" / "weights").write_text("mine")
    before = tree(here)
    finished = run("iris_fast.export", *words, cwd=here)
    assert finished.code == 2
    assert finished.error_line.startswith("iris_fast.export: error: ")
    assert message in finished.error_line
    assert tree(here) == before
