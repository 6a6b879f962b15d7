"""config.json of both layouts: read into a `JanusConfig`, and written from one.

The original config lacks many sizes (its reference hard-codes them), so whatever a weight's shape
tells is taken from there. What no shape tells (numbers of heads) is taken from the config, from
`overrides`, or from the defaults of the reference.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from iris_fast.errors import UserError
from iris_fast.models.decoder import DecoderConfig
from iris_fast.models.janus import JanusConfig, VisionConfig
from iris_fast.models.pretrained.weights import read_json
from iris_fast.models.vq import VQConfig

Shapes = Mapping[str, torch.Size]
LAYOUTS = {"multi_modality": "original", "janus": "transformers"}


def read_config(folder: Path) -> tuple[dict[str, Any], str]:
    """The raw config.json and its layout, "original" or "transformers".

    UserError if there is none or it is not a Janus one.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"no config.json in {folder}: it is not a checkpoint folder")
    raw = read_json(path)
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in LAYOUTS:
        raise UserError(
            f"{path}: model_type is {model_type!r}, expected 'multi_modality' (original Janus) "
            "or 'janus' (transformers): give a Janus or Janus-Pro checkpoint"
        )
    return raw, LAYOUTS[model_type]


class _Block:
    """One sub-dict of config.json; reads typed values and says where a wrong one stands."""

    def __init__(self, raw: dict[str, Any], where: Path, *names: str) -> None:
        self.where = f"{where}: {'.'.join(names)}"
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
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not 0 < value < math.inf
        ):
            raise UserError(f"{self.where}.{key} is {value!r}: expected a positive number")
        return float(value)


def _size(shapes: Shapes, name: str, dim: int, folder: Path) -> int:
    if name not in shapes or len(shapes[name]) <= dim:
        raise UserError(
            f"{folder} has no tensor {name!r} (or not of the right rank): download it again"
        )
    return shapes[name][dim]


def _count(shapes: Shapes, pattern: str) -> int:
    """How many different numbers stand for `(\\d+)` in the tensor names."""
    matches = (re.match(pattern, name) for name in shapes)
    return len({match[1] for match in matches if match})


def build_config(
    raw: dict[str, Any],
    layout: str,
    shapes: Shapes,
    folder: Path,
    overrides: Mapping[str, Any] | None = None,
) -> JanusConfig:
    """The sizes of a checkpoint; `shapes` under transformers' names.

    `overrides`: field values by dotted name, e.g. {"vision.num_heads": 4, "image_size": 96}.
    """
    where = folder / "config.json"
    original = layout == "original"
    decoder = "language_config" if original else "text_config"
    if not isinstance(raw.get(decoder), dict):  # sizes would be guessed, and heads guessed wrong
        raise UserError(f"{where} has no {decoder}: put back the checkpoint's own config.json")
    text = _Block(raw, where, decoder)
    vision = _Block(raw, where, "vision_config")
    pictures = _Block(raw, where, "vision_config", "params") if original else vision
    codes = (
        _Block(raw, where, "gen_vision_config", "params")
        if original
        else _Block(raw, where, "vq_config")
    )
    config = JanusConfig(
        decoder=_decoder_config(text, shapes, folder),
        vq=_vq_config(shapes, folder),
        vision=_vision_config(vision, shapes, folder),
        image_size=pictures.integer("image_size", 384),
    )
    config = _override(config, overrides or {})
    _check_codebook(config, codes, original, shapes, folder)
    grid = config.image_size // config.vision.patch_size
    if grid * grid != config.vision.num_positions or config.image_size % config.patch_size:
        raise UserError(
            f"{where}: image_size {config.image_size} does not fit the weights "
            f"(patch {config.vision.patch_size}, {config.vision.num_positions} positions, "
            f"VQ patch {config.patch_size}): correct image_size"
        )
    return config


def _decoder_config(block: _Block, shapes: Shapes, folder: Path) -> DecoderConfig:
    prefix = "model.language_model."
    hidden = block.integer("hidden_size", _size(shapes, prefix + "embed_tokens.weight", 1, folder))
    heads = block.integer("num_attention_heads", 32)  # LlamaConfig's default, which 7B relies on
    if "head_dim" not in block.data and hidden % heads:
        raise UserError(f"{block.where}: hidden_size {hidden} is no multiple of {heads} heads")
    head_dim = block.integer("head_dim", max(hidden // heads, 1))
    keys = _size(shapes, prefix + "layers.0.self_attn.k_proj.weight", 0, folder)
    kv_heads = block.integer("num_key_value_heads", max(keys // head_dim, 1))
    if heads % kv_heads:
        raise UserError(f"{block.where}: {heads} heads are no multiple of {kv_heads} kv heads")
    rope_key = "rope_parameters" if block.data.get("rope_parameters") else "rope_scaling"
    rope = block.data.get(rope_key) or {}
    if not isinstance(rope, dict):
        raise UserError(f"{block.where}.{rope_key} is {rope!r}: expected an object")
    supported = {
        "hidden_act": block.data.get("hidden_act", "silu") == "silu",
        "attention_bias": not block.data.get("attention_bias"),
        "mlp_bias": not block.data.get("mlp_bias"),
        "rope_type": rope.get("rope_type", rope.get("type", "default")) == "default",
    }
    for key, fine in supported.items():
        if not fine:
            raise UserError(f"{block.where}.{key}: this variant of the decoder is not supported")
    theta = block
    if rope.get("rope_theta") is not None:
        theta = _Block(block.data, folder / "config.json", rope_key)
    return DecoderConfig(
        vocab_size=block.integer(
            "vocab_size", _size(shapes, prefix + "embed_tokens.weight", 0, folder)
        ),
        hidden_size=hidden,
        intermediate_size=block.integer(
            "intermediate_size", _size(shapes, prefix + "layers.0.mlp.gate_proj.weight", 0, folder)
        ),
        num_layers=block.integer(
            "num_hidden_layers", _count(shapes, re.escape(prefix) + r"layers\.(\d+)\.")
        ),
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=block.number("rms_norm_eps", 1e-6),
        rope_theta=theta.number("rope_theta", 10000.0),
        max_positions=block.integer("max_position_embeddings", 2048),
    )


def _vq_config(shapes: Shapes, folder: Path) -> VQConfig:
    prefix = "model.vqmodel."
    base = _size(shapes, prefix + "encoder.conv_in.weight", 0, folder)
    levels = _count(shapes, re.escape(prefix) + r"encoder\.down\.(\d+)\.")
    widths = [
        _size(shapes, f"{prefix}encoder.down.{i}.block.0.conv1.weight", 0, folder)
        for i in range(levels)
    ]
    return VQConfig(
        codebook_size=_size(shapes, prefix + "quantize.embedding.weight", 0, folder),
        codebook_dim=_size(shapes, prefix + "quantize.embedding.weight", 1, folder),
        latent_channels=_size(shapes, prefix + "encoder.conv_out.weight", 0, folder),
        base_channels=base,
        channel_multiplier=tuple(width // base for width in widths),
        num_res_blocks=_count(shapes, re.escape(prefix) + r"encoder\.down\.0\.block\.(\d+)\."),
    )


def _vision_config(block: _Block, shapes: Shapes, folder: Path) -> VisionConfig:
    prefix = "model.vision_model."
    width = _size(shapes, prefix + "embeddings.patch_embedding.weight", 0, folder)
    return VisionConfig(
        hidden_size=width,
        num_layers=_count(shapes, re.escape(prefix) + r"encoder\.layers\.(\d+)\."),
        # Neither the original config nor a shape tells it; SigLIP's heads are 64 wide.
        num_heads=block.integer("num_attention_heads", max(width // 64, 1)),
        mlp_size=_size(shapes, prefix + "encoder.layers.0.mlp.fc1.weight", 0, folder),
        patch_size=_size(shapes, prefix + "embeddings.patch_embedding.weight", 2, folder),
        num_positions=_size(shapes, prefix + "embeddings.position_embedding.weight", 0, folder),
    )


def _override(config: JanusConfig, overrides: Mapping[str, Any]) -> JanusConfig:
    for dotted, value in overrides.items():
        part, _, field = dotted.rpartition(".")
        try:
            if part:
                config = replace(config, **{part: replace(getattr(config, part), **{field: value})})
            else:
                config = replace(config, **{field: value})
        except (AttributeError, TypeError) as error:
            raise UserError(f"there is no config field {dotted!r} to override") from error
    return config


def _check_codebook(
    config: JanusConfig, block: _Block, original: bool, shapes: Shapes, folder: Path
) -> None:
    """The image vocabulary is stated four times; UserError unless all agree."""
    key = "image_token_size" if original else "num_embeddings"
    found = {
        "the VQ's codebook": config.codebook_size,
        "generation_embeddings (gen_embed)": _size(
            shapes, "model.generation_embeddings.weight", 0, folder
        ),
        "generation_head.vision_head (gen_head)": _size(
            shapes, "model.generation_head.vision_head.weight", 0, folder
        ),
        f"config.json {key}": block.integer(key, config.codebook_size),
    }
    if len(set(found.values())) > 1:
        sizes = ", ".join(f"{name} {size}" for name, size in found.items())
        raise UserError(
            f"{folder}: the image vocabularies disagree ({sizes}): parts of different checkpoints?"
        )


def transformers_config(
    config: JanusConfig, ids: Mapping[str, int], dtype: torch.dtype
) -> dict[str, Any]:
    """config.json of the transformers layout; `ids`: bos, eos, pad and image placeholder."""
    decoder, vq, vision = config.decoder, config.vq, config.vision
    name = str(dtype).removeprefix("torch.")
    text = {
        "model_type": "llama",
        "vocab_size": decoder.vocab_size,
        **_llama_sizes(decoder),
        "head_dim": decoder.head_dim,
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
        "rope_parameters": {"rope_type": "default", "rope_theta": decoder.rope_theta},
        "bos_token_id": ids["bos"],
        "eos_token_id": ids["eos"],
        "pad_token_id": ids["pad"],
        "tie_word_embeddings": False,
        "dtype": name,
    }
    return {
        "architectures": ["JanusForConditionalGeneration"],
        "model_type": "janus",
        # The library's default is True, which would overwrite one weight by the other.
        "tie_word_embeddings": False,
        "dtype": name,
        "image_token_id": ids["image"],
        "text_config": text,
        "vision_config": {
            "model_type": "janus_vision_model",
            "hidden_size": vision.hidden_size,
            "num_hidden_layers": vision.num_layers,
            "num_attention_heads": vision.num_heads,
            "mlp_ratio": vision.mlp_size / vision.hidden_size,
            "patch_size": vision.patch_size,
            "image_size": config.image_size,
            "num_image_tokens": vision.num_positions,
            "projection_dim": decoder.hidden_size,
            "depth": 2,
        },
        "vq_config": {
            "model_type": "janus_vqgan",
            "num_embeddings": vq.codebook_size,
            "embed_dim": vq.codebook_dim,
            "latent_channels": vq.latent_channels,
            "base_channels": vq.base_channels,
            "channel_multiplier": list(vq.channel_multiplier),
            "num_res_blocks": vq.num_res_blocks,
            "num_patches": config.image_size // config.patch_size,
            "projection_dim": decoder.hidden_size,
            "image_token_embed_dim": decoder.hidden_size,
        },
    }


def _llama_sizes(decoder: DecoderConfig) -> dict[str, Any]:
    return {
        "hidden_size": decoder.hidden_size,
        "intermediate_size": decoder.intermediate_size,
        "num_hidden_layers": decoder.num_layers,
        "num_attention_heads": decoder.num_heads,
        "num_key_value_heads": decoder.num_kv_heads,
        "max_position_embeddings": decoder.max_positions,
        "rms_norm_eps": decoder.rms_norm_eps,
    }


def original_config(config: JanusConfig, dtype: torch.dtype) -> dict[str, Any]:
    """config.json of the original layout."""
    width = config.decoder.hidden_size
    name = str(dtype).removeprefix("torch.")

    def block(cls: str, model_type: str, **params: Any) -> dict[str, Any]:
        return {"cls": cls, "model_type": model_type, "params": params}

    projector = {"depth": 2, "n_embed": width, "projector_type": "mlp_gelu"}
    vision = block(
        "CLIPVisionTower",
        "vision",
        image_size=config.image_size,
        model_name=f"siglip_large_patch{config.vision.patch_size}_{config.image_size}",
        select_feature="same",
        select_layer=-1,
    )
    vision["num_attention_heads"] = config.vision.num_heads  # ours: see _vision_config
    return {
        "model_type": "multi_modality",
        "architectures": ["MultiModalityCausalLM"],
        "torch_dtype": name,
        "vision_config": vision,
        "aligner_config": block(
            "MlpProjector", "aligner", input_dim=config.vision.hidden_size, **projector
        ),
        "gen_vision_config": block(
            "VQ-16",
            "gen_vision",
            image_token_size=config.codebook_size,
            n_embed=config.codebook_dim,
        ),
        "gen_aligner_config": block(
            "MlpProjector", "gen_aligner", input_dim=config.codebook_dim, **projector
        ),
        "gen_head_config": block(
            "vision_head",
            "gen_head",
            image_token_embed=width,
            image_token_size=config.codebook_size,
            n_embed=width,
        ),
        "language_config": {
            "model_type": "llama",
            "vocab_size": config.decoder.vocab_size,
            **_llama_sizes(config.decoder),
            "head_dim": config.decoder.head_dim,
            "rope_theta": config.decoder.rope_theta,
            "torch_dtype": name,
        },
    }
