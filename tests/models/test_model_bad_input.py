"""Every bad model folder is one clear line that names the file or tensor, and no code is run."""

import json
import os
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from iris_fast.errors import UserError
from iris_fast.models.pretrained import save, weights
from iris_fast.models.pretrained.load import load_janus
from iris_fast.models.pretrained.save import save_janus

LAYOUTS = ["original", "transformers"]
WEIGHTS = "model.safetensors"


@pytest.fixture(params=LAYOUTS)
def folder(request, tiny_folders, tmp_path):
    """A fresh valid model folder that the test damages."""
    return shutil.copytree(tiny_folders[request.param], tmp_path / "model")


@pytest.fixture
def original(tiny_folders, tmp_path):
    return shutil.copytree(tiny_folders["original"], tmp_path / "model")


@pytest.fixture
def hf(tiny_folders, tmp_path):
    return shutil.copytree(tiny_folders["transformers"], tmp_path / "model")


def refused(folder) -> str:
    """The message with which a folder is refused: one line, with a remedy."""
    with pytest.raises(UserError) as caught:
        load_janus(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    return message


def edit_json(path, **changes):
    data = json.loads(path.read_text())
    for dotted, value in changes.items():
        *parents, key = dotted.split("__")
        block = data
        for parent in parents:
            block = block[parent]
        if value is None:
            del block[key]
        else:
            block[key] = value
    path.write_text(json.dumps(data))


def edit_weights(folder, change):
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def test_good_checkpoint(folder):
    load_janus(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_missing_file(folder, name):
    (folder / name).unlink()
    assert f"no {name}" in refused(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("content", [b"{ half", b"", b"\xff\xfe\x00"], ids=repr)
def test_unreadable_json(folder, name, content):
    (folder / name).write_bytes(content)
    message = refused(folder)
    assert name in message
    assert "again" in message


def test_json_of_the_wrong_kind(folder):
    (folder / "config.json").write_text("[1]")
    assert "should hold a JSON object, found a list" in refused(folder)
    (folder / "config.json").write_text("{}")
    assert "model_type is None" in refused(folder)


def test_other_model(folder):
    edit_json(folder / "config.json", model_type="llama")
    message = refused(folder)
    assert "model_type is 'llama'" in message
    assert "give a Janus" in message


def test_no_weights(folder):
    (folder / WEIGHTS).unlink()
    assert "no weights" in refused(folder)


def test_truncated_safetensors(folder):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])
    message = refused(folder)
    assert WEIGHTS in message
    assert "download it again" in message


@pytest.mark.parametrize("content", [b"", b"garbage" * 100], ids=["empty", "garbage"])
@pytest.mark.parametrize("name", [WEIGHTS, "pytorch_model.bin"])
def test_garbage_weights(folder, name, content):
    (folder / WEIGHTS).unlink()
    (folder / name).write_bytes(content)
    message = refused(folder)
    assert name in message
    assert "download it again" in message


def test_truncated_bin(folder):
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    (folder / WEIGHTS).unlink()
    data = (folder / "pytorch_model.bin").read_bytes()
    (folder / "pytorch_model.bin").write_bytes(data[: len(data) // 2])
    assert "pytorch_model.bin is damaged" in refused(folder)


@pytest.mark.parametrize("form", ["zip", "legacy", "bare pickle"])
def test_pickle_with_code_is_not_run(original, form):
    trace = original / "ran"

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(trace),)

    tensors = load_file(original / WEIGHTS) | {"evil": Evil()}
    (original / WEIGHTS).unlink()
    path = original / "pytorch_model.bin"
    if form == "bare pickle":
        path.write_bytes(pickle.dumps(Evil()))
    else:
        torch.save(tensors, path, _use_new_zipfile_serialization=form == "zip")
    message = refused(original)
    assert "pytorch_model.bin" in message
    assert not trace.exists()
    assert "can run code" in message
    if form == "zip":
        assert "holds more than tensors" in message
        torch.load(path, weights_only=False)  # it does run when that is allowed
        assert trace.exists()


def test_bin_of_something_else(original):
    (original / WEIGHTS).unlink()
    torch.save([1, 2], original / "pytorch_model.bin")
    assert "dict of tensors" in refused(original)


@pytest.fixture
def sharded(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "MAX_SHARD_SIZE", "1MB")
    return save_janus(tiny, tmp_path / "sharded")


def test_missing_shard(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    assert f"{shard} is missing" in refused(sharded)


def test_tensor_missing_from_its_shard(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[0]
    tensors = load_file(shard)
    name = next(iter(tensors))
    del tensors[name]
    save_file(tensors, shard)
    message = refused(sharded)
    assert name in message
    assert shard.name in message


@pytest.mark.parametrize("weight_map", [{}, []])
def test_bad_index(sharded, weight_map):
    index = sharded / "model.safetensors.index.json"
    edit_json(index, weight_map=weight_map)
    assert "has no weight_map" in refused(sharded)


@pytest.mark.parametrize("name", ["../other.safetensors", "..", "", "config.json"])
def test_index_that_points_outside_or_to_no_weights(sharded, name):
    save_file({"lm_head.weight": torch.zeros(1)}, sharded.parent / "other.safetensors")
    index = sharded / "model.safetensors.index.json"
    edit_json(index, weight_map={"lm_head.weight": name})
    assert f"names {name!r}, which is not a weight file in its folder; " in refused(sharded)


def test_missing_tensors_are_named(folder):
    def change(tensors):
        for name in list(tensors):
            if "layers.1.mlp" in name and "language" in name:
                del tensors[name]

    edit_weights(folder, change)
    message = refused(folder)
    assert "lacks tensors model.language_model.layers.1.mlp." in message


def test_missing_vision_tower(hf):
    edit_weights(hf, lambda tensors: tensors.pop("model.aligner.fc1.bias"))
    assert "lacks tensor model.aligner.fc1.bias" in refused(hf)


def test_missing_size_giving_tensor(hf):
    edit_weights(hf, lambda t: t.pop("model.language_model.embed_tokens.weight"))
    assert "model.language_model.embed_tokens.weight" in refused(hf)


def test_tied_checkpoint(hf):
    edit_weights(hf, lambda tensors: tensors.pop("lm_head.weight"))
    message = refused(hf)
    assert "lacks tensor lm_head.weight" in message
    assert "tied" in message


def test_unexpected_shape(hf):
    name = "model.language_model.layers.2.self_attn.o_proj.weight"

    def change(tensors):
        tensors[name] = tensors[name][:, :-1].contiguous()

    edit_weights(hf, change)
    message = refused(hf)
    assert f"{name}: [128, 127], expected [128, 128]" in message


def test_config_with_fewer_layers_than_weights(hf):
    edit_json(hf / "config.json", text_config__num_hidden_layers=3)
    assert "model.language_model.layers.3." in refused(hf)


@pytest.mark.parametrize("value", [-1, 0, "many", 1.5, True])
def test_nonsense_size(hf, value):
    edit_json(hf / "config.json", text_config__num_attention_heads=value)
    message = refused(hf)
    assert "text_config.num_attention_heads" in message
    assert repr(value) in message


@pytest.mark.parametrize("key", ["rope_theta", "rms_norm_eps"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0, "big"], ids=repr)
def test_numbers_that_are_none(hf, key, value):
    edit_json(hf / "config.json", text_config__rope_parameters={}, **{f"text_config__{key}": value})
    assert f"text_config.{key} is {value!r}: expected a positive number" in refused(hf)


@pytest.mark.parametrize("value", [float("nan"), "big"], ids=repr)
def test_a_rope_theta_among_the_rope_parameters(hf, value):
    edit_json(hf / "config.json", text_config__rope_parameters={"rope_theta": value})
    assert f"rope_parameters.rope_theta is {value!r}: expected a positive" in refused(hf)


def test_rope_parameters_of_another_kind(hf):
    edit_json(hf / "config.json", text_config__rope_parameters="x")
    assert "text_config.rope_parameters is 'x': expected an object" in refused(hf)


@pytest.mark.parametrize("value", [["janus"], {}, 3], ids=repr)
def test_a_model_type_of_another_kind(folder, value):
    edit_json(folder / "config.json", model_type=value)
    assert f"model_type is {value!r}" in refused(folder)


def test_deeply_nested_json(folder):
    (folder / "config.json").write_text("[" * 100_000)
    assert "config.json cannot be read as JSON" in refused(folder)


def test_a_config_without_the_decoder_s_sizes(folder):
    """Single sizes may be the library's defaults, not all of them: heads follow from no shape."""
    config = json.loads((folder / "config.json").read_text())
    (name,) = {"text_config", "language_config"} & config.keys()
    edit_json(folder / "config.json", **{name: None})
    assert f"config.json has no {name}" in refused(folder)
    edit_json(folder / "config.json", **{name: [1]})
    assert f"config.json has no {name}" in refused(folder)


def test_heads_that_do_not_divide(hf):
    edit_json(hf / "config.json", text_config__num_attention_heads=3, text_config__head_dim=None)
    assert "not a multiple of 3 heads" in refused(hf)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("hidden_act", "gelu"),
        ("attention_bias", True),
        ("mlp_bias", True),
        ("rope_parameters", {"rope_type": "llama3", "rope_theta": 1e4}),
    ],
)
def test_unsupported_variants(hf, key, value):
    edit_json(hf / "config.json", **{f"text_config__{key}": value})
    assert "not supported" in refused(hf)


def test_wrong_image_size(folder):
    config = json.loads((folder / "config.json").read_text())
    params = config["vision_config"].get("params", config["vision_config"])
    params["image_size"] = 128
    (folder / "config.json").write_text(json.dumps(config))
    assert "image_size 128 does not fit" in refused(folder)


@pytest.mark.parametrize(
    "name",
    [
        "model.generation_embeddings.weight",
        "model.generation_head.vision_head.weight",
        "model.vqmodel.quantize.embedding.weight",
    ],
)
def test_codebook_sizes_disagree(hf, name):
    def change(tensors):
        tensors[name] = tensors[name][:200].contiguous()

    edit_weights(hf, change)
    message = refused(hf)
    assert "image vocabularies disagree" in message
    assert "200" in message


def test_codebook_size_of_the_config(folder):
    config = json.loads((folder / "config.json").read_text())
    block = config.get("vq_config") or config["gen_vision_config"]["params"]
    block["num_embeddings" if "vq_config" in config else "image_token_size"] = 300
    (folder / "config.json").write_text(json.dumps(config))
    assert "image vocabularies disagree" in refused(folder)


def test_tokenizer_larger_than_the_model(hf):
    def change(tensors):
        for name in ("lm_head.weight", "model.language_model.embed_tokens.weight"):
            tensors[name] = tensors[name][:400].contiguous()

    edit_weights(hf, change)
    edit_json(hf / "config.json", text_config__vocab_size=400)
    assert "ids up to 488, the model only 400 rows" in refused(hf)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "name", ["model.language_model.norm.weight", "model.vqmodel.decoder.mid.attn_1.k.bias"]
)
def test_weights_that_are_not_finite(hf, name, value):
    def change(tensors):
        tensors[name].view(-1)[-1] = value

    edit_weights(hf, change)
    assert f"tensor {name} holds NaN or infinity" in refused(hf)


def test_quantised_weights(hf):
    def change(tensors):
        tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.int8)

    edit_weights(hf, change)
    message = refused(hf)
    assert "lm_head.weight" in message
    assert "quantised" in message


@pytest.mark.parametrize("string", ["<begin_of_image>", "<｜▁pad▁｜>", "<end_of_image>"])
def test_missing_special_token(folder, string):
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace(string, "<other>"))
    message = refused(folder)
    assert "no special token" in message
    assert string in message


def test_export_refuses_to_overwrite(tiny, tmp_path):
    target = tmp_path / "out"
    target.mkdir()
    (target / "keep").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        save_janus(tiny, target)
    assert [p.name for p in target.iterdir()] == ["keep"]
    with pytest.raises(UserError, match="choose transformers or original"):
        save_janus(tiny, tmp_path / "other", layout="hf")


def test_export_of_what_is_not_finite_though_never_run(hf, tmp_path):
    def change(tensors):
        tensors["model.vision_model.post_layernorm.bias"][3] = float("nan")

    edit_weights(hf, change)
    with pytest.raises(UserError, match=r"vision_model\.post_layernorm\.bias.*NaN"):
        save_janus(load_janus(hf), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_export_onto_a_file_s_child(tiny, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        save_janus(tiny, tmp_path / "file" / "out")


@pytest.mark.parametrize("fault", ["flip", "drop", "disk full"])
def test_export_notices_a_faulty_disk(tiny, tmp_path, monkeypatch, fault):
    """Nothing appears under the name, and no partial folder stays."""
    write = weights.save_torch_state_dict

    def faulty(tensors, folder, **options):
        if fault == "disk full":
            raise OSError(28, "No space left on device")
        write(tensors, folder, **options)
        path = folder / WEIGHTS
        data = bytearray(path.read_bytes())
        if fault == "flip":
            data[-5] ^= 1
        else:
            del data[-100:]
        path.write_bytes(data)

    monkeypatch.setattr(weights, "save_torch_state_dict", faulty)
    with pytest.raises(UserError):
        save_janus(tiny, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_export_is_never_half_there(tiny, tmp_path, monkeypatch):
    """The name appears by one rename, after everything was checked."""
    seen = []

    def spy(source, target):
        seen.append((sorted(p.name for p in source.iterdir()), target.exists()))
        os.rename(source, target)

    monkeypatch.setattr(save.os, "replace", spy)
    folder = save_janus(tiny, tmp_path / "deep" / "out")
    assert seen == [(sorted(p.name for p in folder.iterdir()), False)]
