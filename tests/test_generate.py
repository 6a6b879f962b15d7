"""`python -m iris_fast.generate`: the files that it writes, and what they depend on."""

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
    """A tiny model whose samples depend on prompt and seed. Read-only."""
    checkpoint = build_random_tiny(seed=5)
    set_spread(checkpoint, text=2.5, image=0.6)
    return save_janus(checkpoint, tmp_path_factory.mktemp("model") / "model")


@pytest.fixture
def generate(here: Path, model: Path):
    """Generates the three prompts into `folder`; the codes, and the hashes of its files."""
    (here / "p.txt").write_text("\n".join(PROMPTS))

    def generate(folder: str, **settings) -> tuple[np.ndarray, dict[str, str]]:
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

    return generate


def test_images_are_named_by_prompt_and_number(generate):
    _, files = generate("out")
    assert list(files) == [f"{p:05d}_{i:02d}.png" for p in range(3) for i in range(2)]
    assert {Image.open(f"out/{name}").size for name in files} == {(24, 24)}  # 3 x 3 of 8 pixels
    assert {Image.open(f"out/{name}").mode for name in files} == {"RGB"}
    assert len(set(files.values())) == 6


def test_codes_are_prompts_by_images_by_tokens_in_prompt_order(generate, here):
    codes, files = generate("out")
    assert codes.shape == (3, 2, 9)
    assert codes.dtype == np.int64
    assert 0 <= codes.min() <= codes.max() < 256
    # Random numbers depend on a prompt's place in the file; that of the first two is unchanged.
    (here / "p.txt").write_text("\n".join(PROMPTS[:2]))
    fewer, first = generate("fewer")
    assert np.array_equal(fewer, codes[:2])
    assert {name: files[name] for name in first} == first


def test_pixels_are_the_codes_decoded(generate, model):
    codes, _ = generate("out", cot=True)
    images = decode_images(load_janus(model).vq, torch.from_numpy(codes).flatten(0, 1))
    for image, path in zip(images, sorted(Path("out").iterdir()), strict=True):
        assert image.tobytes() == Image.open(path).tobytes()


def test_equal_codes_give_equal_images(model):
    vq = load_janus(model).vq
    codes = torch.randint(256, (7, 9), generator=torch.Generator().manual_seed(0))
    images = decode_images(vq, codes)
    for row, image in enumerate(images):
        (alone,) = decode_images(vq, codes[row : row + 1])
        assert alone.tobytes() == image.tobytes()


@pytest.mark.parametrize("cot", [False, True])
def test_images_do_not_depend_on_the_batch_size(generate, cot):
    codes, files = generate("whole", cot=cot)
    for batch_size in (1, 4):
        again, same = generate(f"by{batch_size}", cot=cot, batch_size=batch_size)
        assert np.array_equal(again, codes)
        assert same == files


def test_images_do_not_depend_on_the_number_of_ranks(generate, model, here):
    codes, files = generate("one")
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


def test_the_seed_changes_the_codes(generate):
    codes, _ = generate("out")
    other, _ = generate("other", seed=1)
    assert (codes != other).any(axis=2).all()


def test_greedy_is_one_image_whatever_the_seed(generate):
    codes, files = generate("out", greedy=True)
    other, same = generate("other", greedy=True, seed=1)
    assert np.array_equal(codes, other)
    assert files == same
    assert np.array_equal(codes[:, 0], codes[:, 1])
    cold, _ = generate("cold", temperature=0.0)
    assert np.array_equal(cold, codes)


def test_guidance_and_temperature_are_used(generate):
    codes, _ = generate("out")
    assert (generate("weaker", cfg_weight=1.0)[0] != codes).any()
    assert (generate("colder", temperature=0.2)[0] != codes).any()


def test_a_chain_of_thought_changes_the_images(generate):
    assert (generate("plain")[0] != generate("thought", cot=True)[0]).any()


def test_existing_images_stop_the_command_and_stay(generate, capsys, here):
    generate("out")
    before = tree(here)
    config = {"prompts": "p.txt", "output_dir": "out", "image_token_num_per_image": 4}
    assert main(GenerateConfig(**config)) == 2
    line = capsys.readouterr().err
    assert "out/00000_00.png exists already and is not overwritten" in line
    assert "--overwrite true" in line
    assert main(GenerateConfig(**config | {"output_dir": "new", "save_codes": "out.npz"})) == 2
    assert "save_codes: out.npz exists already" in capsys.readouterr().err
    assert tree(here) == before


def test_overwrite_replaces_them(generate):
    generate("out")
    codes, files = generate("out", overwrite=True, seed=9)
    again, same = generate("fresh", seed=9)
    assert np.array_equal(codes, again)
    assert files == same


def test_images_are_added_to_other_files(generate, here):
    (here / "out").mkdir()
    (here / "out" / "notes.txt").write_text("mine")
    _, files = generate("out")
    assert len(files) == 7


def test_the_default_model_generates_at_full_size(here):
    (here / "p.txt").write_text("a cube\n")
    finished = run("iris_fast.generate", "--prompts", "p.txt", cwd=here)
    assert (finished.code, finished.err) == (0, "")
    assert finished.out == "1 images in images\n"
    assert Image.open(here / "images" / "00000_00.png").size == (32, 32)


def test_a_training_runs_settings_generate_what_its_flags_do(here, model):
    (here / "p.txt").write_text("a cube\n")
    words = ["--model", model, "--prompts", "p.txt", "--image_token_num_per_image", "4"]
    words += ["--cot", "true", "--max_completion_length", "5", "--temperature", "0.5"]
    printed = run("iris_fast.train", *words, "--output_dir", "runs/a", "--print_config", cwd=here)
    (here / "config.yaml").write_text(printed.out)
    run("iris_fast.generate", *words, "--cfg_weight", "1", "--output_dir", "flags", cwd=here)
    finished = run("iris_fast.generate", "--config", "config.yaml", cwd=here)
    assert (finished.code, finished.out) == (0, "1 images in images\n")
    assert tree(here / "images") == tree(here / "flags") != {}
    assert not (here / "runs").exists()


@pytest.mark.shared
@pytest.mark.parametrize("layout", ["janus_original_tiny", "janus_hf_tiny"])
def test_real_layouts_give_the_same_images(shared, here, layout):
    """Both have the same weights, and give the same greedy codes for any batch size."""
    config = {
        "prompts": str(shared / "data" / "t2i_compbench" / "color_val.txt"),
        "greedy": True,
        "num_images_per_prompt": 1,
    }
    lines = Path(config["prompts"]).read_text().splitlines()[:3]
    (here / "p.txt").write_text("\n".join(lines))
    config["prompts"] = "p.txt"
    codes = []
    for name, batch_size in (("janus_original_tiny", 1), (layout, 3)):
        settings = {"model": str(shared / "fixtures" / name), "output_dir": f"{name}{batch_size}"}
        file = f"{name}{batch_size}.npz"
        assert (
            main(GenerateConfig(**config, **settings, batch_size=batch_size, save_codes=file)) == 0
        )
        codes.append(np.load(file)["codes"])
    assert codes[0].shape == (3, 1, 36)
    assert np.array_equal(*codes)


def test_ctrl_c_ends_without_a_traceback_and_leaves_whole_images(here):
    running = start("iris_fast.generate", "--batch_size", "1", cwd=here)
    wait_for(lambda: list(here.glob("images/*.png")))
    os.kill(running.processes[0].pid, signal.SIGINT)
    finished = running.wait()
    assert (finished.code, finished.err) == (-signal.SIGINT, "")
    for path in here.glob("images/[0-9]*.png"):
        Image.open(path).load()
