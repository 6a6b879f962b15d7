"""The VQ against transformers and against the arithmetic of its definition."""

import json

import pytest
import torch
import torch.nn.functional as F
from janus_reference import open_reference

from iris_fast.models.pretrained.load import VQ_PREFIX, load_janus
from iris_fast.models.pretrained.names import to_original
from iris_fast.models.vq import VQConfig, VQModel, to_uint8

TOLERANCE = 5e-5


@pytest.mark.shared
@pytest.mark.parametrize("name", ["janus_original_tiny", "janus_hf_tiny"])
@torch.no_grad()
def test_equals_transformers(fixtures, name):
    hf = open_reference(fixtures / "janus_hf_tiny").model.vqmodel
    vq = load_janus(fixtures / name).vq
    codes = torch.randint(0, 128, (2, 36))
    expected = hf.decode(codes)
    assert expected.abs().max() > 1
    assert (vq.decode(codes) - expected).abs().max() < TOLERANCE
    pixels = torch.rand(2, 3, 96, 96) * 2 - 1
    expected = hf.quant_conv(hf.encoder(pixels))
    assert (vq.quant_conv(vq.encoder(pixels)) - expected).abs().max() < TOLERANCE
    # transformers' encode skips the normalisations: the two agree on a unit-norm codebook alone.
    for quantize in (hf.quantize, vq.quantize):
        quantize.embedding.weight.copy_(F.normalize(quantize.embedding.weight, dim=-1))
    assert torch.equal(vq.encode(pixels), hf.encode(pixels).image_tokens.view(2, 36))


@torch.no_grad()
def test_codes_are_nearest_normalised_rows(tiny):
    pixels = torch.rand(2, 3, 64, 64) * 2 - 1
    latents = tiny.vq.quant_conv(tiny.vq.encoder(pixels)).flatten(2).transpose(1, 2).double()
    codebook = F.normalize(tiny.vq.quantize.embedding.weight.double(), dim=-1)
    distances = torch.cdist(F.normalize(latents, dim=-1), codebook.expand(2, -1, -1))
    assert torch.equal(tiny.vq.encode(pixels), distances.argmin(-1))


@torch.no_grad()
def test_decoding_ignores_the_length_of_codebook_rows(tiny):
    codes = torch.randint(0, 256, (1, 64))
    copy = VQModel(tiny.config.vq)
    copy.load_state_dict(tiny.vq.state_dict())
    copy.quantize.embedding.weight.mul_(7.0)
    assert (copy.decode(codes) - tiny.vq.decode(codes)).abs().max() < 1e-5


@torch.no_grad()
def test_codes_are_row_major(tiny):
    """Changing the second code changes the image most at the right of the first."""
    codes = torch.zeros(1, 64, dtype=torch.int64)
    changed = codes.clone()
    changed[0, 1] = 100
    difference = (tiny.vq.decode(changed) - tiny.vq.decode(codes)).abs().sum(1)[0]
    top, left = divmod(int(difference.argmax()), 64)
    assert top < 20
    assert 2 <= left < 22


def test_wrong_number_of_codes(tiny):
    for shape in ((1, 63), (64,)):
        with pytest.raises(ValueError, match="side"):
            tiny.vq.decode(torch.zeros(shape, dtype=torch.int64))


def test_uint8_truncates_and_clips():
    values = torch.tensor([-2.0, -1.0, 0.0, 1.0, 3.0, 2 * 99.9 / 255 - 1])
    pixels = values.repeat(3, 1).view(1, 3, 1, 6)
    expected = torch.tensor([0, 0, 127, 255, 255, 99], dtype=torch.uint8)
    image = to_uint8(pixels)
    assert image.shape == (1, 1, 6, 3)
    assert torch.equal(image[0, 0, :, 1], expected)
    channels = torch.tensor([-1.0, 0.0, 1.0]).view(1, 3, 1, 1)
    assert to_uint8(channels).flatten().tolist() == [0, 127, 255]


@pytest.mark.shared
def test_full_size_names_and_shapes(fixtures):
    expected = json.loads((fixtures / "vq_full_shapes.json").read_text())
    expected.pop("gen_vision_model.quantize.codebook_used", None)
    with torch.device("meta"):
        vq = VQModel(VQConfig())
    named = to_original({VQ_PREFIX + name: t for name, t in vq.state_dict().items()})
    assert {name: list(tensor.shape) for name, tensor in named.items()} == expected
