"""The constructed VQ model: lossless on the world's tiles."""

import numpy as np
import pytest
import torch

from iris_fast.models.pretrained.load import load_janus
from iris_fast.models.pretrained.save import save_janus
from iris_fast.models.vq import to_uint8
from iris_fast.tiny.recipe.construct_vq import VQ_CONFIG, construct_vq, encode_all
from iris_fast.tiny.recipe.measure import verifier_rates, vq_reconstruction
from iris_fast.tiny.recipe.pretrain_decoder import build_untrained
from iris_fast.tiny.world import NUM_CODES, WORLDS, random_scenes, render_codes, scene_codes

MAX_ERROR = 4  # of 255


@pytest.fixture(scope="module")
def vq():
    torch.set_num_threads(1)
    return construct_vq()


def pictures(name: str) -> np.ndarray:
    """Codes [N, 64] of a world's scenes, of tiles at random, or of one tile everywhere."""
    rng = np.random.default_rng(6)
    if name == "random":
        return rng.integers(NUM_CODES, size=(16, 64))
    if name == "one tile":
        return np.repeat(rng.integers(NUM_CODES, size=(16, 1)), 64, axis=1)
    return scene_codes(random_scenes(24, 90, WORLDS[name]))


@pytest.mark.parametrize("name", [*WORLDS, "random", "one tile"])
def test_pixels_of_codes(vq, name):
    codes = pictures(name)
    decoded = to_uint8(vq.decode(torch.from_numpy(codes))).numpy().astype(int)
    assert np.abs(decoded - render_codes(codes)).max() <= MAX_ERROR


@pytest.mark.parametrize("name", [*WORLDS, "random"])
def test_codes_of_pixels(vq, name):
    codes = pictures(name)
    wrong = (encode_all(vq, render_codes(codes)).numpy() != codes).mean()
    assert wrong <= (0.001 if name in WORLDS else 0.005)


def test_the_verifier_reads_reconstructions_as_it_reads_renders(vq):
    rates = verifier_rates(60, 90, vq_reconstruction(vq))
    assert min(min(both) for both in rates.values()) >= 0.99


def test_saving_in_bfloat16_changes_nothing(vq):
    for name, tensor in vq.state_dict().items():
        assert torch.equal(tensor, tensor.bfloat16().float()), name


@pytest.mark.parametrize("layout", ["original", "transformers"])
def test_opens_from_both_layouts(layout, tmp_path):
    """Although the encoder has no res blocks to read the sizes from."""
    folder = save_janus(build_untrained(1), tmp_path / "model", layout)
    assert load_janus(folder).config.vq == VQ_CONFIG


def test_the_same_bits_every_time(vq):
    torch.manual_seed(3)
    again = construct_vq()
    for name, tensor in vq.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    assert vq.config == VQ_CONFIG
