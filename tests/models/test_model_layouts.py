"""Both layouts: opened, saved, opened again, and opened by transformers."""

import functools
import http.client
import io
import itertools
import json
import os
import ssl
import urllib.error
import urllib.request

import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub import constants
from janus_reference import open_reference
from safetensors.torch import load_file
from transformers import AutoProcessor, JanusForConditionalGeneration

from iris_fast.errors import UserError
from iris_fast.models.decoder import DecoderConfig
from iris_fast.models.janus import Janus, JanusConfig, VisionConfig
from iris_fast.models.pretrained import hub, weights
from iris_fast.models.pretrained.config_json import build_config
from iris_fast.models.pretrained.load import VQ_PREFIX, load_janus, untouched_shapes
from iris_fast.models.pretrained.names import ORIGINAL_ONLY, to_original, to_transformers
from iris_fast.models.pretrained.save import layout_json, save_janus
from iris_fast.models.pretrained.weights import read_tensors
from iris_fast.models.templates import TEMPLATES, image_prompt_ids
from iris_fast.models.vq import VQConfig, VQModel
from iris_fast.tiny import build_random_tiny

LAYOUTS = ["original", "transformers"]
FIXTURE_OF = {"original": "janus_original_tiny", "transformers": "janus_hf_tiny"}


def all_tensors(loaded):
    """Every tensor that both layouts hold, under transformers' names."""
    tensors = dict(loaded.model.state_dict())
    tensors |= {VQ_PREFIX + name: t for name, t in loaded.vq.state_dict().items()}
    tensors |= {
        name: t for name, t in loaded.untouched.items() if not name.startswith(ORIGINAL_ONLY)
    }
    return tensors


def assert_same_tensors(left, right):
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert torch.equal(tensor, right[name]), name


@pytest.mark.shared
def test_the_two_fixtures_hold_the_same_tensors(fixtures):
    hf = load_file(fixtures / "janus_hf_tiny" / "model.safetensors")
    original = load_file(fixtures / "janus_original_tiny" / "model.safetensors")
    renamed = to_transformers(original)
    dropped = {name for name in renamed if name.startswith(ORIGINAL_ONLY)}
    assert len(dropped) == 14
    assert_same_tensors({k: v for k, v in renamed.items() if k not in dropped}, hf)
    assert_same_tensors(to_original(renamed), original)


@pytest.mark.shared
def test_bin_equals_safetensors(fixtures, tmp_path):
    source = fixtures / "janus_original_tiny"
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            os.symlink(file, tmp_path / file.name)
    ours, theirs = load_janus(tmp_path), load_janus(source)
    assert ours.config == theirs.config
    assert_same_tensors(all_tensors(ours), all_tensors(theirs))


@pytest.mark.shared
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sizes_of_the_fixtures(fixtures, layout):
    config = load_janus(fixtures / FIXTURE_OF[layout]).config
    assert config.image_tokens == 36
    assert (config.vq.codebook_size, config.vq.codebook_dim, config.vq.patch_size) == (128, 8, 16)
    assert config.vq == VQConfig(128, 8, 40, 32, (1, 1, 1, 2, 2), 2)
    assert (config.decoder.num_layers, config.decoder.head_dim) == (3, 16)


@pytest.mark.parametrize("source", ["tiny", *(pytest.param(f, marks=pytest.mark.shared)
                                              for f in FIXTURE_OF.values())])  # fmt: skip
@pytest.mark.parametrize("chain", list(itertools.product(LAYOUTS, LAYOUTS)), ids="-".join)
@pytest.mark.parametrize("shard", ["5GB", "200KB"], ids=["single", "sharded"])
def test_round_trips_are_bitwise(request, tmp_path, monkeypatch, source, chain, shard):
    monkeypatch.setattr(weights, "MAX_SHARD_SIZE", shard)
    if source == "tiny":
        first = request.getfixturevalue("tiny")
    else:
        first = load_janus(request.getfixturevalue("fixtures") / source, dtype=torch.bfloat16)
    here = first
    for number, layout in enumerate(chain):
        folder = save_janus(here, tmp_path / str(number), layout)
        assert (folder / "model.safetensors.index.json").exists() == (shard != "5GB")
        here = load_janus(folder, dtype=first.model.lm_head.weight.dtype)
        assert here.layout == layout
    assert here.config == first.config
    assert_same_tensors(all_tensors(here), all_tensors(first))
    text = "<|User|>: A <begin_of_image>fox's  tail,\n42!"
    assert here.tokenizer.encode(text) == first.tokenizer.encode(text)
    if first.layout == "original" and set(chain) == {"original"}:  # nothing at all is lost
        assert here.untouched.keys() == first.untouched.keys()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0", "1"]  # no leftovers


def test_sharded_bin(tiny_folders, tmp_path):
    folder = tmp_path / "bin"
    folder.mkdir()
    for file in tiny_folders["original"].iterdir():
        if file.suffix == ".json":
            os.symlink(file, folder / file.name)
    tensors = list(load_file(tiny_folders["original"] / "model.safetensors").items())
    weight_map = {}
    for number, part in enumerate((tensors[::2], tensors[1::2]), 1):
        name = f"pytorch_model-{number:05d}-of-00002.bin"
        torch.save(dict(part), folder / name)
        weight_map |= dict.fromkeys(dict(part), name)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert_same_tensors(
        all_tensors(load_janus(folder)), all_tensors(load_janus(tiny_folders["original"]))
    )


@pytest.mark.parametrize("source", ["tiny", *(pytest.param(layout, marks=pytest.mark.shared)
                                              for layout in LAYOUTS)])  # fmt: skip
def test_transformers_opens_the_export(request, tmp_path, source):
    if source == "tiny":
        ours = request.getfixturevalue("tiny")
    else:
        ours = load_janus(request.getfixturevalue("fixtures") / FIXTURE_OF[source])
    folder = save_janus(ours, tmp_path / "out")
    hf, report = JanusForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values()), report
    assert hf.config.tie_word_embeddings is False
    assert hf.get_input_embeddings().weight.data_ptr() != hf.lm_head.weight.data_ptr()
    for name, tensor in ours.model.state_dict().items():
        assert torch.equal(hf.state_dict()[name], tensor), name
    assert hf.config.vq_config.num_patches**2 == ours.config.image_tokens
    assert hf.config.image_token_id == ours.tokenizer.image_placeholder_id
    generation = hf.generation_config
    assert generation.generation_kwargs["boi_token_id"] == ours.tokenizer.image_start_id
    assert generation.pad_token_id == ours.tokenizer.pad_id
    assert generation.guidance_scale == 5


@pytest.mark.parametrize("source", ["tiny", pytest.param("original", marks=pytest.mark.shared)])
def test_the_exported_processor_gives_our_ids(request, tmp_path, source):
    if source == "tiny":
        ours = request.getfixturevalue("tiny")
    else:
        ours = load_janus(request.getfixturevalue("fixtures") / FIXTURE_OF[source])
    processor = AutoProcessor.from_pretrained(save_janus(ours, tmp_path / "out"))
    text = "two red circles,  left of\n a blue square "
    for content in (text, [{"type": "text", "text": text}]):
        rendered = processor.apply_chat_template(
            [{"role": "<|User|>", "content": content}], add_generation_prompt=True
        )
        ids = processor(text=[rendered], generation_mode="image")["input_ids"]
        expected = image_prompt_ids(ours.tokenizer, TEMPLATES["janus-pro"], text)
        assert ids.tolist() == [expected]


@pytest.mark.skipif(
    transformers.__version__.startswith("5.17."),
    reason="transformers 5.17 calls a function of its own without an argument that it needs",
)
@torch.no_grad()
def test_transformers_generates_from_the_export(tiny_folders, tmp_path):
    """The library's own image generation runs, which needs generation_config.json to be right."""
    hf = open_reference(tiny_folders["transformers"])
    processor = AutoProcessor.from_pretrained(tiny_folders["transformers"])
    inputs = processor(text=["a red circle"], generation_mode="image")
    codes = hf.generate(**inputs, generation_mode="image", do_sample=False)
    assert codes.shape == (1, 64)
    assert hf.decode_image_tokens(codes).shape == (1, 64, 64, 3)


def test_export_in_another_dtype(tiny, tmp_path):
    folder = save_janus(tiny, tmp_path / "out", dtype=torch.bfloat16)
    assert {t.dtype for t in read_tensors(folder).values()} == {torch.bfloat16}
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == config["text_config"]["dtype"] == "bfloat16"


def test_export_keeps_tensors_that_share_memory(tmp_path):
    ours = build_random_tiny()
    ours.model.lm_head.weight = ours.model.model.language_model.embed_tokens.weight
    back = load_janus(save_janus(ours, tmp_path / "out"))
    assert_same_tensors(dict(back.model.state_dict()), dict(ours.model.state_dict()))


def test_loaded_weights_are_not_the_file(tiny, tmp_path):
    """A run is independent of later writes to its model file, and does not write to it."""
    folder = save_janus(tiny, tmp_path / "out")
    path = folder / "model.safetensors"
    before, size = path.read_bytes(), path.stat().st_size
    ours = load_janus(folder)
    with path.open("r+b") as file:
        file.write(bytes(size))
    assert_same_tensors(dict(ours.model.state_dict()), dict(tiny.model.state_dict()))
    path.write_bytes(before)
    ours = load_janus(folder)
    with torch.no_grad():
        for parameter in ours.model.parameters():
            parameter.zero_()
    assert path.read_bytes() == before


def test_only_the_vq_is_frozen(tiny_folders):
    ours = load_janus(tiny_folders["transformers"])
    assert all(p.requires_grad for p in ours.model.parameters())
    assert not any(p.requires_grad for p in ours.vq.parameters())


SMALL_CONFIG_KEYS = (
    "model_type",
    "vocab_size",
    "max_position_embeddings",
    "num_hidden_layers",
    "torch_dtype",
)
PRESETS = {
    "1b": (DecoderConfig(102400, 2048, 5632, 24, 16, 16, 128), 882, 2_089_297_547),
    "7b": (DecoderConfig(102400, 4096, 11008, 30, 32, 32, 128), 936, 7_420_434_059),
}
ATTENTION_POOL_ELEMENTS = (
    1024  # latent
    + 2 * (1024 * 1024 + 1024)  # q, proj
    + 2048 * 1024
    + 2048  # kv
    + 2 * 1024  # norm
    + 2 * 1024 * 4096
    + 4096
    + 1024  # mlp
)


@pytest.mark.parametrize("name", PRESETS)
def test_full_size_checkpoints(name, tmp_path):
    """Number and size of the real checkpoints' tensors, and their sizes read back from a config
    that states as little as the real one."""
    decoder, count, elements = PRESETS[name]
    config = JanusConfig(decoder, VQConfig(), VisionConfig(1024, 24, 16, 4096, 16, 576), 384)
    with torch.device("meta"):
        tensors = dict(Janus(config).state_dict())
        tensors |= {VQ_PREFIX + k: v for k, v in VQModel(config.vq).state_dict().items()}
        tensors |= {k: torch.empty(shape) for k, shape in untouched_shapes(config).items()}
    original = to_original(tensors)
    assert len(original) + 13 + 1 == count
    total = sum(tensor.numel() for tensor in original.values())
    assert total + ATTENTION_POOL_ELEMENTS + 65536 == elements
    raw = layout_json("original", "config.json", config, torch.bfloat16)
    raw["vision_config"].pop("num_attention_heads")
    raw["_attn_implementation"] = "flash_attention_2"
    if name == "7b":
        raw["language_config"] = {
            key: value for key, value in raw["language_config"].items() if key in SMALL_CONFIG_KEYS
        }
    shapes = {key: tensor.shape for key, tensor in to_transformers(original).items()}
    assert build_config(raw, "original", shapes, tmp_path) == config


@pytest.fixture
def online(monkeypatch):
    monkeypatch.setattr(hub, "hub_is_reachable", lambda: True)


@pytest.mark.usefixtures("online")
def test_hub_ids(tiny_folders, monkeypatch, tmp_path):
    """A hub id is downloaded without pickles, unless the hub has nothing else."""
    asked = []

    def download(name, allow_patterns, local_files_only):
        assert not local_files_only
        asked.append((name, allow_patterns))
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    folder = tiny_folders["original"]
    assert load_janus("some-org/Janus-1.0").path == folder
    assert asked == [("some-org/Janus-1.0", ["*.json", "*.safetensors"])]
    folder = tmp_path
    assert hub.resolve_model("some-org/Janus") == tmp_path
    assert asked[2] == ("some-org/Janus", ["*.json", "*.bin"])


@pytest.mark.usefixtures("online")
def test_hub_failures(monkeypatch, tmp_path):
    def fail(*args, **kwargs):
        raise OSError("no route to host\nand more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(UserError, match=r"org/name.*no route to host\); check the name"):
        hub.resolve_model("org/name")
    for name in ("missing", "a/b/c", "./missing", "/no/such/folder", "../x"):
        with pytest.raises(UserError, match="it is not a hub id"):
            hub.resolve_model(name)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        hub.resolve_model(tmp_path / "file")


def test_offline_the_hub_is_not_asked(monkeypatch, tmp_path):
    """Only the local cache is, and a model that is not in it is refused at once."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(urllib.request, "urlopen", None)  # a call would raise
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        functools.partial(huggingface_hub.snapshot_download, cache_dir=tmp_path),
    )
    with pytest.raises(UserError, match=r"org/name, it is not in .*HF_HUB_OFFLINE is set"):
        hub.resolve_model("org/name")
    cached = tmp_path / "models--org--name"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    (cached / "snapshots" / ("0" * 40)).mkdir(parents=True)
    assert hub.resolve_model("org/name") == cached / "snapshots" / ("0" * 40)


@pytest.mark.parametrize(
    ("answer", "reachable"),
    [
        (io.BytesIO(), True),
        (urllib.error.HTTPError("", 429, "busy", {}, None), True),
        (urllib.error.URLError(ssl.SSLCertVerificationError()), True),
        (urllib.error.URLError(OSError("name not known")), False),
        (TimeoutError(), False),
        (http.client.BadStatusLine("proxy"), True),
        (ValueError("unknown url type"), True),
    ],
    ids=["answers", "busy", "certificate", "name not known", "timeout", "proxy", "endpoint"],
)
def test_reachability_is_one_request(monkeypatch, answer, reachable):
    requests = []

    def urlopen(request, timeout):
        requests.append((request.method, request.full_url, timeout))
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    assert hub.hub_is_reachable() is reachable
    assert requests == [("HEAD", constants.ENDPOINT, hub.REACHABLE_TIMEOUT_S)]
