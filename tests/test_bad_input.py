"""User errors: one line with the place and the remedy, exit code 2, no file changed. Each case runs
the command on real files."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import Finished, run, start, wait_for
from disks import read_only
from safetensors.torch import load_file, save_file
from small_runs import flags, quick, tree

from iris_fast.models.pretrained.save import save_janus
from iris_fast.tiny import build_random_tiny
from iris_fast.train import train

SMALL = ["--image_token_num_per_image", "4"]


def refused(cwd: Path, *arguments: object, module: str = "iris_fast.train") -> str:
    """The one line with which the command fails, having changed nothing below `cwd`."""
    before = tree(cwd), sorted(cwd.rglob("*"))
    words = flags() if module == "iris_fast.train" else SMALL
    finished = run(module, *words, *arguments, cwd=cwd)
    check_refusal(finished, module)
    assert (tree(cwd), sorted(cwd.rglob("*"))) == before
    return finished.error_line


def check_refusal(finished: Finished, module: str) -> None:
    assert finished.code == 2, finished
    assert finished.error_line.startswith(f"{module}: error: ")
    assert len(finished.error_line) < 700
    assert "Traceback" not in finished.err + finished.out


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory) -> Path:
    """The tiny model as a folder. Read-only."""
    return save_janus(build_random_tiny(), tmp_path_factory.mktemp("tiny") / "model")


# --- Prompts --------------------------------------------------------------------------------------

PROMPTS: dict[str, tuple[str, bytes | None, list[str]]] = {
    "missing": ("absent.txt", None, ["absent.txt: no such file"]),
    "empty": ("p.txt", b"", ["p.txt: there is no prompt in it"]),
    "garbage": ("p.txt", b"a cube\n\x80\x81\x00\xff", ["p.txt line 2", "UTF-8"]),
    "garbage jsonl": ("p.jsonl", b'{"prompt": "a"}\nrubbish\n', ["p.jsonl line 2", "not JSON"]),
    "nothing in it": ("p.txt", b"a cube\n \na ball\n", ["p.txt line 2", "empty prompt"]),
    "control character": ("p.txt", b"a\nb\nc\x1b[0m\n", ["p.txt line 3", "U+001B"]),
    "10,000 characters": (
        "p.txt",
        b"a\n" + b"red cubes," * 1000,
        ["prompt 2", "10000 char", "512"],
    ),
    "special token": ("p.txt", b"a <begin_of_image> b", ["prompt 1", "<begin_of_image>"]),
    "no field": ("p.jsonl", b'{"text": "a cube"}', ["p.jsonl line 1", "`prompt`"]),
}


@pytest.mark.parametrize("module", ["iris_fast.train", "iris_fast.generate"])
@pytest.mark.parametrize(("name", "content", "expected"), PROMPTS.values(), ids=PROMPTS)
def test_prompt_files(here, module, name, content, expected):
    if content is not None:
        (here / name).write_bytes(content)
    line = refused(here, "--prompts", name, "--output_dir", "out", module=module)
    assert all(part in line for part in ["prompts: ", *expected]), line


@pytest.mark.parametrize("module", ["iris_fast.train", "iris_fast.generate"])
@pytest.mark.parametrize("cot", [True, False])
def test_sequences_longer_than_the_model_has_positions_for(here, module, cot):
    long = "a red ball and " * (10 if cot else 500)
    (here / "p.txt").write_text(f"a cube\n{long}a cone\n")
    words = ["--prompts", "p.txt", "--output_dir", "out", "--cot", str(cot).lower()]
    words += ["--max_completion_length", "1000"] if cot else ["--max_prompt_length", "9999"]
    words += ["--reward_funcs", "[image_nsc]"]
    line = refused(here, *words, module=module)
    assert "longest prompt ('a red ball and" in line
    assert "tiny has 1024" in line
    assert ("lower --max_completion_length or" in line) == cot


def test_emoji_are_accepted(here):
    (here / "p.txt").write_text("a 😀 cube and a 👩‍👩‍👧\n")
    words = flags(prompts="p.txt", output_dir="out", sample_steps=1, max_steps=1)
    finished = run("iris_fast.train", *words, cwd=here)
    assert (finished.code, finished.err) == (0, "")


# --- Checkpoints ----------------------------------------------------------------------------------


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil_ran",)


def truncate_weights(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 100_000)


def pickle_with_code(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Evil()}, folder / "pytorch_model.bin")


def change_weights(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def put_nan(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.language_model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")


def put_inf_into_vq(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.vqmodel.decoder.conv_out.bias"][0] = float("inf")


def drop_head(tensors: dict[str, torch.Tensor]) -> None:
    del tensors["lm_head.weight"]


def change_config(*path: str, to: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        block = config
        for name in path[:-1]:
            block = block[name]
        block[path[-1]] = to
        (folder / "config.json").write_text(json.dumps(config))

    return damage


def enlarge_tokenizer(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["one token too many"] = 700
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def only_a_readme(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    (folder / "README.md").write_text("not here")


MODEL_FOLDERS: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "no checkpoint": (only_a_readme, ["model", "no config.json", "not a model folder"]),
    "another architecture": (change_config("model_type", to="llama"), ["config.json", "'llama'"]),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), ["config.json", "JSON"]),
    "truncated safetensors": (truncate_weights, ["model.safetensors", "damaged"]),
    "pickle with code": (pickle_with_code, ["pytorch_model.bin", "can run code"]),
    "vocabulary of the model": (
        change_config("text_config", "vocab_size", to=400),
        ["model", "embed_tokens", "[640, 128]", "[400, 128]"],
    ),
    "vocabulary of the tokenizer": (enlarge_tokenizer, ["tokenizer.json", "700", "640"]),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), ["no tokenizer.json"]),
    "NaN": (change_weights(put_nan), ["layers.1.mlp.up_proj.weight", "NaN"]),
    "infinity in the VQ": (change_weights(put_inf_into_vq), ["decoder.conv_out.bias", "infinity"]),
    "missing tensor": (change_weights(drop_head), ["lacks tensor lm_head.weight"]),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ["no weights in"]),
}


@pytest.mark.parametrize(("damage", "expected"), MODEL_FOLDERS.values(), ids=MODEL_FOLDERS)
def test_model_folders(here, tiny_folder, damage, expected):
    shutil.copytree(tiny_folder, here / "model")
    damage(here / "model")
    (here / "p.txt").write_text("a cube\n")
    arguments = ["--model", "model", "--prompts", "p.txt", "--output_dir", "out"]
    line = refused(here, *arguments)
    assert all(part in line for part in expected), line
    assert not (here / "evil_ran").exists()
    assert refused(here, *arguments, module="iris_fast.generate") == line.replace(
        "iris_fast.train", "iris_fast.generate"
    )


def test_a_model_that_does_not_exist(here):
    (here / "p.txt").write_text("a cube\n")
    for model in ("absent", "./absent/folder", "p.txt"):
        line = refused(here, "--model", model, "--prompts", "p.txt")
        assert model.removeprefix("./") in line


def test_a_model_without_prompts(here, tiny_folder):
    line = refused(here, "--model", tiny_folder)
    assert "needs a prompt file; add --prompts FILE" in line


def test_more_image_tokens_than_the_model_generates(here):
    line = refused(here, "--image_token_num_per_image", "100")
    assert "image_token_num_per_image: 100" in line
    assert "64" in line


def test_an_instruction_without_its_placeholder(here):
    (here / "ask.txt").write_text("Describe it.")
    assert "ask.txt has no {prompt}" in refused(here, "--cot_instruction", "ask.txt")
    assert "absent.txt cannot be read" in refused(here, "--cot_instruction", "absent.txt")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_does_not_exist(here):
    assert "device: cuda is not available" in refused(here, "--device", "cuda")


@pytest.mark.parametrize("module", ["iris_fast.train", "iris_fast.generate"])
@pytest.mark.parametrize("name", ["varlen", "flash_attention_2", "xformers"])
def test_attention_that_needs_a_gpu_is_refused_before_anything_is_opened(here, module, name):
    chosen = ("--attn_implementation", name, "--device", "cpu", "--output_dir", "out")
    line = refused(here, *chosen, "--prompts", "absent.txt", module=module)
    assert f"attn_implementation: {name} needs a GPU" in line
    assert "use --attn_implementation sdpa" in line


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE"])
def test_half_of_a_launchers_environment(here, name):
    """Otherwise rank 1 of 2 would wait for a rank 0 that is not started."""
    finished = run("iris_fast.train", *flags(), cwd=here, **{name: "1"})
    check_refusal(finished, "iris_fast.train")
    assert "is not set, while other variables of a launcher are" in finished.error_line


# --- Output folders -------------------------------------------------------------------------------


def test_a_folder_with_another_run(here):
    train(quick("run", max_steps=1))
    line = refused(here, "--output_dir", "run")
    assert "output_dir: run is not empty and is not overwritten" in line
    assert "--resume_from_checkpoint true" in line


def test_a_folder_in_use_by_a_running_process(here):
    """A second process would write the same checkpoints and delete rows of the first."""
    words = flags(output_dir="run", max_steps=10_000)
    first = start("iris_fast.train", *words, cwd=here)
    wait_for(lambda: (here / "run" / "metrics.jsonl").exists())
    second = run("iris_fast.train", *words, "--resume_from_checkpoint", "true", cwd=here)
    assert first.processes[0].is_alive()
    os.kill(first.processes[0].pid, signal.SIGTERM)
    assert first.wait().code == 0
    check_refusal(second, "iris_fast.train")
    assert "another process is running in run" in second.error_line
    steps = [json.loads(line)["step"] for line in (here / "run/metrics.jsonl").open()]
    assert steps == list(range(1, len(steps) + 1))


def test_a_folder_with_other_files(here):
    (here / "photos").mkdir()
    (here / "photos" / "cat.jpg").write_bytes(b"cat")
    assert "photos is not empty" in refused(here, "--output_dir", "photos")


def test_a_file_in_place_of_the_folder(here):
    (here / "out").write_text("mine")
    assert "out is a file; name a folder" in refused(here, "--output_dir", "out")
    line = refused(here, "--output_dir", "out/run")
    assert "output_dir: out/run cannot be written (Not a directory)" in line
    line = refused(here, "--output_dir", "out/pictures", module="iris_fast.generate")
    assert "output_dir: out/pictures cannot be written (Not a directory)" in line


@pytest.mark.parametrize("module", ["iris_fast.train", "iris_fast.generate"])
@pytest.mark.parametrize("output", [["--output_dir", "locked/new"], ["--output_dir", "locked"], []])
def test_a_read_only_folder(here, module, output):
    (here / "locked").mkdir()
    with read_only(here / "locked") as locked:
        cwd = here if output else locked  # or the default folder in a locked directory
        line = refused(cwd, *output, module=module)
        assert "cannot be written (Read-only file system)" in line
        assert "name a place that you may write to" in line


def test_a_run_that_has_become_read_only(here):
    train(quick("run", max_steps=1))
    with read_only(here / "run"):
        line = refused(here, "--output_dir", "run", "--resume_from_checkpoint", "true")
        assert "output_dir: run cannot be written (Read-only file system)" in line


def test_resuming_with_other_prompts(here):
    (here / "p.txt").write_text("a cube\na ball\n")
    train(quick("run", prompts="p.txt", max_steps=1))
    resume = ["--output_dir", "run", "--prompts", "p.txt", "--resume_from_checkpoint", "true"]
    (here / "p.txt").write_text("a cube\na cone\n")
    assert "p.txt holds other prompts than when" in refused(here, *resume)
    (here / "p.txt").write_text("a ball\na cube\n")  # the order matters
    assert "p.txt holds other prompts than when" in refused(here, *resume)
    (here / "p.txt").write_text("a cube \r\na ball\n\n")  # white space does not
    assert run("iris_fast.train", *flags(), *resume, cwd=here).code == 0


def test_a_reward_whose_field_no_prompt_has(here):
    (here / "my.py").write_text("def reward(prompts, images, colour): return [0.0] * len(prompts)")
    (here / "p.jsonl").write_text('{"prompt": "a cube", "color": "red"}\n')
    words = flags(reward_funcs="[my:reward]", prompts="p.jsonl", output_dir="run")
    finished = run("iris_fast.train", *words, cwd=here)
    check_refusal(finished, "iris_fast.train")
    assert "fields color: missing a required argument: 'colour'" in finished.error_line
    assert not (here / "run").exists()


def test_resuming_a_folder_without_a_run(here):
    line = refused(here, "--output_dir", "absent", "--resume_from_checkpoint", "true")
    assert "absent/config.yaml cannot be read (No such file" in line
    assert "output_dir" in refused(here, "--resume_from_checkpoint", "true")


# --- Diverging ------------------------------------------------------------------------------------


def test_a_run_that_diverges_stops_in_one_line_and_keeps_its_checkpoints(here):
    words = flags(output_dir="run", learning_rate=1e30, max_grad_norm=0, save_steps=1, max_steps=9)
    finished = run("iris_fast.train", *words, cwd=here)
    check_refusal(finished, "iris_fast.train")
    assert "gradient norm is" in finished.error_line
    assert "lower --learning_rate" in finished.error_line


# --- The command as such --------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["iris_fast.train", "iris_fast.generate"])
def test_a_new_interpreter_prints_the_same(here, module):
    """The cases above run in forked processes, this one runs `python -m`."""
    finished = subprocess.run(
        [sys.executable, "-m", module, "--prompts", "absent.txt"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (finished.returncode, finished.stdout) == (2, "")
    assert finished.stderr == (
        f"{module}: error: prompts: absent.txt: no such file; give a .txt or .jsonl file that "
        "exists, or a Hugging Face dataset's folder or org/name\n"
    )
    assert list(here.iterdir()) == []


def test_two_ranks_print_the_same_line(here):
    finished = run("iris_fast.train", "--prompts", "absent.txt", cwd=here, ranks=2)
    assert set(finished.codes) == {2}
    # torchrun would end the second rank while it still waits.
    assert len(set(finished.err.splitlines())) == 1
