"""Read config.json of both layouts into a `JanusConfig`.

The original config lacks many sizes (its reference hard-codes them), so every size that follows
from a weight's shape is taken from there. What no shape determines (numbers of heads) comes from
the config or from the defaults of the reference.
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from iris_fast.errors import UserError
from iris_fast.models.decoder import DecoderConfig
from iris_fast.models.janus import JanusConfig, VisionConfig
from iris_fast.models.pretrained.weights import read_json
from iris_fast.models.vq import VQConfig

LAYOUT_OF = {"multi_modality": "original", "janus": "transformers"}


def read_config(folder: Path) -> tuple[dict[str, Any], str]:
    """The raw config.json and its layout, "original" or "transformers".

    UserError if there is none or if it is not that of a Janus model.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"no config.json in {folder}; it is not a model folder")
    raw = read_json(path)
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in LAYOUT_OF:
        raise UserError(
            f"{path}: model_type is {model_type!r}, expected 'multi_modality' (original Janus) "
            "or 'janus' (transformers); give a Janus or Janus-Pro model"
        )
    return raw, LAYOUT_OF[model_type]


class _Shapes:
    """Tensor shapes of a model folder, under transformers' names."""

    def __init__(self, shapes: Mapping[str, torch.Size], folder: Path) -> None:
        self.shapes, self.folder = shapes, folder

    def size(self, name: str, dim: int) -> int:
        """The size of one dimension; UserError if there is none."""
        shape = self.shapes.get(name, ())
        if len(shape) <= dim:
            wrong = f"{self.folder} has no tensor {name!r} (or not of the right rank)"
            raise UserError(f"{wrong}; download it again")
        return shape[dim]

    def count(self, prefix: str) -> int:
        """How many different numbers follow `prefix` in the names."""
        matches = (re.match(re.escape(prefix) + r"(\d+)\.", name) for name in self.shapes)
        return len({match[1] for match in matches if match})


class _Section:
    """A sub-dict of config.json, {} if absent; reports where a wrong value is."""

    def __init__(self, raw: dict[str, Any], file: Path, *names: str) -> None:
        self.file, self.where = file, f"{file}: {'.'.join(names)}"
        data: Any = raw
        for name in names:
            data = data.get(name) if isinstance(data, dict) else None
        self.data: dict[str, Any] = data if isinstance(data, dict) else {}

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.data.get(key)
        value = default if value is None else value
        if isinstance(value, (list, tuple)) and len(set(value)) == 1:  # [384, 384]
            value = value[0]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"{self.where}.{key} is {value!r}: expected a positive integer")
        return value

    def number(self, key: str, default: float) -> float:
        value = self.data.get(key)
        value = default if value is None else value
        numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not numeric or not 0 < value < math.inf:
            raise UserError(f"{self.where}.{key} is {value!r}: expected a positive number")
        return float(value)


def build_config(
    raw: dict[str, Any], layout: str, shapes: Mapping[str, torch.Size], folder: Path
) -> JanusConfig:
    """The sizes of a model; `shapes` under transformers' names."""
    file, known, original = folder / "config.json", _Shapes(shapes, folder), layout == "original"
    decoder = "language_config" if original else "text_config"
    if not isinstance(raw.get(decoder), dict):  # sizes would be guessed, and heads guessed wrong
        raise UserError(f"{file} has no {decoder}; restore the model's own config.json")
    image = vision = _Section(raw, file, "vision_config")
    stated = _Section(raw, file, "vq_config"), "num_embeddings"
    if original:
        image = _Section(raw, file, "vision_config", "params")
        stated = _Section(raw, file, "gen_vision_config", "params"), "image_token_size"
    config = JanusConfig(
        decoder=_decoder_config(_Section(raw, file, decoder), known),
        vq=_vq_config(known),
        vision=_vision_config(vision, known),
        image_size=image.integer("image_size", 384),
    )
    _check_codebook(config.vq.codebook_size, *stated, known)
    grid = config.image_size // config.vision.patch_size
    if grid * grid != config.vision.num_positions or config.image_size % config.vq.patch_size:
        raise UserError(
            f"{file}: image_size {config.image_size} does not fit the weights "
            f"(patch {config.vision.patch_size}, {config.vision.num_positions} positions, "
            f"VQ patch {config.vq.patch_size}); correct image_size"
        )
    return config


def _decoder_config(section: _Section, shapes: _Shapes) -> DecoderConfig:
    model = "model.language_model."
    embedding, layer = model + "embed_tokens.weight", model + "layers.0."
    hidden = section.integer("hidden_size", shapes.size(embedding, 1))
    heads = section.integer("num_attention_heads", 32)  # LlamaConfig's default, which 7B relies on
    if "head_dim" not in section.data and hidden % heads:
        raise UserError(f"{section.where}: hidden_size {hidden} is not a multiple of {heads} heads")
    head_dim = section.integer("head_dim", max(hidden // heads, 1))
    keys = shapes.size(layer + "self_attn.k_proj.weight", 0)
    kv_heads = section.integer("num_key_value_heads", max(keys // head_dim, 1))
    if heads % kv_heads:
        raise UserError(f"{section.where}: {heads} heads are not a multiple of {kv_heads} kv heads")
    mlp = shapes.size(layer + "mlp.gate_proj.weight", 0)
    return DecoderConfig(
        vocab_size=section.integer("vocab_size", shapes.size(embedding, 0)),
        hidden_size=hidden,
        intermediate_size=section.integer("intermediate_size", mlp),
        num_layers=section.integer("num_hidden_layers", shapes.count(model + "layers.")),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=section.number("rms_norm_eps", 1e-6),
        rope_theta=_rope_theta(section),
        max_positions=section.integer("max_position_embeddings", 2048),
    )


def _rope_theta(section: _Section) -> float:
    """The base of the rotary frequencies; UserError for variants that the decoder lacks."""
    data = section.data
    key = "rope_parameters" if data.get("rope_parameters") else "rope_scaling"
    rope = data.get(key) or {}
    if not isinstance(rope, dict):
        raise UserError(f"{section.where}.{key} is {rope!r}: expected an object")
    supported = {
        "hidden_act": data.get("hidden_act", "silu") == "silu",
        "attention_bias": not data.get("attention_bias"),
        "mlp_bias": not data.get("mlp_bias"),
        "rope_type": rope.get("rope_type", rope.get("type", "default")) == "default",
    }
    for name, fine in supported.items():
        if not fine:
            raise UserError(f"{section.where}.{name}: this variant of the decoder is not supported")
    if rope.get("rope_theta") is not None:
        section = _Section(data, section.file, key)
    return section.number("rope_theta", 10000.0)


def _vq_config(shapes: _Shapes) -> VQConfig:
    vq, codebook = "model.vqmodel.", "model.vqmodel.quantize.embedding.weight"
    base = shapes.size(vq + "encoder.conv_in.weight", 0)
    # Read from the pixel decoder, which has a res block at every level even where the encoder has
    # none; its lowest resolution comes first.
    levels = (f"{vq}decoder.up.{i}." for i in range(shapes.count(vq + "decoder.up.")))
    widths = [shapes.size(level + "block.0.conv1.weight", 0) for level in levels][::-1]
    return VQConfig(
        codebook_size=shapes.size(codebook, 0),
        codebook_dim=shapes.size(codebook, 1),
        latent_channels=shapes.size(vq + "encoder.conv_out.weight", 0),
        base_channels=base,
        channel_multiplier=tuple(width // base for width in widths),
        num_res_blocks=shapes.count(vq + "decoder.up.0.block.") - 1,
    )


def _vision_config(section: _Section, shapes: _Shapes) -> VisionConfig:
    tower = "model.vision_model."
    width = shapes.size(tower + "embeddings.patch_embedding.weight", 0)
    return VisionConfig(
        hidden_size=width,
        num_layers=shapes.count(tower + "encoder.layers."),
        # In neither the original config nor a shape; SigLIP's heads are 64 wide.
        num_heads=section.integer("num_attention_heads", max(width // 64, 1)),
        mlp_size=shapes.size(tower + "encoder.layers.0.mlp.fc1.weight", 0),
        patch_size=shapes.size(tower + "embeddings.patch_embedding.weight", 2),
        num_positions=shapes.size(tower + "embeddings.position_embedding.weight", 0),
    )


def _check_codebook(codebook_size: int, section: _Section, key: str, shapes: _Shapes) -> None:
    """UserError unless the four places that state the image vocabulary agree."""
    head = "model.generation_head.vision_head.weight"
    found = {
        "the VQ's codebook": codebook_size,
        "generation_embeddings (gen_embed)": shapes.size("model.generation_embeddings.weight", 0),
        "generation_head.vision_head (gen_head)": shapes.size(head, 0),
        f"config.json {key}": section.integer(key, codebook_size),
    }
    if len(set(found.values())) > 1:
        sizes = ", ".join(f"{name} {size}" for name, size in found.items())
        cause = f"the image vocabularies disagree ({sizes})"
        raise UserError(f"{shapes.folder}: {cause}; use files of one and the same model")
