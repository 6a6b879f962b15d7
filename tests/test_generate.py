"""`python -m iris_fast.generate`: what lands on disk, and what it depends on."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import run, start, wait_for
from PIL import Image
from small_runs import set_spread, tree

from iris_fast.config import GenerateConfig
from iris_fast.generate import main
from iris_fast.models.images import decode_images
from iris_fast.models.pretrained.load import load_janus
from iris_fast.models.pretrained.save import save_janus
from iris_fast.tiny import build_random_tiny

PROMPTS = ["a red cube", "two yellow pyramids", "a small blue ball left of a large green cone"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A tiny model whose draws depend on prompt and seed. Read-only."""
    checkpoint = build_random_tiny(seed=5)
    set_spread(checkpoint, text=2.5, image=0.6)
    return save_janus(checkpoint, tmp_path_factory.mktemp("model") / "model")


@pytest.fixture
def draw(here: Path, model: Path):
    """Draws the three prompts into `folder`; the codes, and the hashes of its files."""
    (here / "p.txt").write_text("\n".join(PROMPTS))

    def draw(folder: str, **settings) -> tuple[np.ndarray, dict[str, str]]:
        defaults = {
            "model": str(model),
            "prompts": "p.txt",
            "output_dir": folder,
            "save_codes": f"{folder}.npz",
            "image_token_num_per_image": 9,
            "num_images_per_prompt": 2,
            "max_completion_length": 5,
        }
        assert main(GenerateConfig(**defaults | settings)) == 0
        return np.load(f"{folder}.npz")["codes"], tree(Path(folder))

    return draw


def test_images_are_named_by_prompt_and_number(draw):
    _, files = draw("out")
    assert list(files) == [f"{p:05d}_{i:02d}.png" for p in range(3) for i in range(2)]
    assert {Image.open(f"out/{name}").size for name in files} == {(24, 24)}  # 3 x 3 of 8 pixels
    assert {Image.open(f"out/{name}").mode for name in files} == {"RGB"}
    assert len(set(files.values())) == 6


def test_codes_are_prompts_by_images_by_tokens_in_prompt_order(draw, here):
    codes, files = draw("out")
    assert codes.shape == (3, 2, 9)
    assert codes.dtype == np.int64
    assert 0 <= codes.min() <= codes.max() < 256
    # One prompt in another place of the file has other random numbers; the first two here do not.
    (here / "p.txt").write_text("\n".join(PROMPTS[:2]))
    fewer, first = draw("fewer")
    assert np.array_equal(fewer, codes[:2])
    assert {name: files[name] for name in first} == first


def test_pixels_are_the_codes_decoded(draw, model):
    codes, _ = draw("out", cot=True)
    pictures = decode_images(load_janus(model).vq, torch.from_numpy(codes).flatten(0, 1))
    for picture, path in zip(pictures, sorted(Path("out").iterdir()), strict=True):
        assert picture.tobytes() == Image.open(path).tobytes()


@pytest.mark.parametrize("cot", [False, True])
def test_images_do_not_depend_on_the_batch_size(draw, cot):
    codes, files = draw("whole", cot=cot)
    for batch_size in (1, 4):
        again, same = draw(f"by{batch_size}", cot=cot, batch_size=batch_size)
        assert np.array_equal(again, codes)
        assert same == files


def test_images_do_not_depend_on_the_number_of_ranks(draw, model, here):
    codes, files = draw("one")
    words = f"--model {model} --prompts p.txt --output_dir two --save_codes two.npz".split()
    words += ["--image_token_num_per_image", "9", "--num_images_per_prompt", "2"]
    finished = run("iris_fast.generate", *words, cwd=here, ranks=2)
    assert finished.codes == [0, 0]
    assert finished.out == "6 images in two\n"
    assert tree(here / "two") == files
    assert np.array_equal(np.load("two.npz")["codes"], codes)


def test_more_ranks_than_images(here):
    (here / "p.txt").write_text("a cube\n")
    words = ["--prompts", "p.txt", "--output_dir", "out", "--image_token_num_per_image", "4"]
    finished = run("iris_fast.generate", *words, cwd=here, ranks=2)
    assert (finished.codes, finished.err) == ([0, 0], "")
    assert [path.name for path in (here / "out").iterdir()] == ["00000_00.png"]


def test_the_seed_decides(draw):
    codes, _ = draw("out")
    other, _ = draw("other", seed=1)
    assert (codes != other).any(axis=2).all()


def test_greedy_is_one_image_whatever_the_seed(draw):
    codes, files = draw("out", greedy=True)
    other, same = draw("other", greedy=True, seed=1)
    assert np.array_equal(codes, other)
    assert files == same
    assert np.array_equal(codes[:, 0], codes[:, 1])
    cold, _ = draw("cold", temperature=0.0)
    assert np.array_equal(cold, codes)


def test_guidance_and_temperature_are_used(draw):
    codes, _ = draw("out")
    assert (draw("weaker", cfg_weight=1.0)[0] != codes).any()
    assert (draw("colder", temperature=0.2)[0] != codes).any()


def test_a_chain_of_thought_changes_the_picture(draw):
    assert (draw("plain")[0] != draw("thought", cot=True)[0]).any()


def test_existing_images_stop_the_command_and_stay(draw, capsys, here):
    draw("out")
    before = tree(here)
    config = {"prompts": "p.txt", "output_dir": "out", "image_token_num_per_image": 4}
    assert main(GenerateConfig(**config)) == 2
    line = capsys.readouterr().err
    assert "out/00000_00.png is there already and is not written over" in line
    assert "--overwrite true" in line
    assert main(GenerateConfig(**config | {"output_dir": "new", "save_codes": "out.npz"})) == 2
    assert "save_codes: out.npz is there already" in capsys.readouterr().err
    assert tree(here) == before


def test_overwrite_replaces_them(draw):
    draw("out")
    codes, files = draw("out", overwrite=True, seed=9)
    again, same = draw("fresh", seed=9)
    assert np.array_equal(codes, again)
    assert files == same


def test_images_beside_other_files_are_added(draw, here):
    (here / "out").mkdir()
    (here / "out" / "notes.txt").write_text("mine")
    _, files = draw("out")
    assert len(files) == 7


def test_the_default_draws_the_built_in_prompts_at_full_size(here):
    (here / "p.txt").write_text("a cube\n")
    finished = run("iris_fast.generate", "--prompts", "p.txt", cwd=here)
    assert (finished.code, finished.err) == (0, "")
    assert finished.out == "1 images in images\n"
    assert Image.open(here / "images" / "00000_00.png").size == (64, 64)


@pytest.mark.shared
@pytest.mark.parametrize("layout", ["janus_original_tiny", "janus_hf_tiny"])
def test_real_layouts_give_the_same_images(shared, here, layout):
    """Both hold the same weights; so do greedy codes, whatever the batch."""
    config = {
        "prompts": str(shared / "data" / "t2i_compbench" / "color_val.txt"),
        "greedy": True,
        "num_images_per_prompt": 1,
    }
    lines = Path(config["prompts"]).read_text().splitlines()[:3]
    (here / "p.txt").write_text("\n".join(lines))
    config["prompts"] = "p.txt"
    drawn = []
    for name, batch_size in (("janus_original_tiny", 1), (layout, 3)):
        settings = {"model": str(shared / "fixtures" / name), "output_dir": f"{name}{batch_size}"}
        codes = f"{name}{batch_size}.npz"
        assert (
            main(GenerateConfig(**config, **settings, batch_size=batch_size, save_codes=codes)) == 0
        )
        drawn.append(np.load(codes)["codes"])
    assert drawn[0].shape == (3, 1, 36)
    assert np.array_equal(*drawn)


def test_ctrl_c_ends_without_a_traceback_and_leaves_whole_images(here):
    running = start("iris_fast.generate", "--batch_size", "1", cwd=here)
    wait_for(lambda: list(here.glob("images/*.png")))
    os.kill(running.processes[0].pid, signal.SIGINT)
    finished = running.wait()
    assert (finished.code, finished.err) == (-signal.SIGINT, "")
    for path in here.glob("images/[0-9]*.png"):
        Image.open(path).load()
