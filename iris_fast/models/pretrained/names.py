"""Tensor names of the two checkpoint layouts, and the two tensors that also change shape.

Inside this package every name is the transformers one. The table is read in both directions.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

# original prefix, transformers prefix; `{i}` stands for a layer number. The first match wins.
PREFIXES = [
    ("language_model.model.", "model.language_model."),
    ("language_model.lm_head.", "lm_head."),
    ("gen_embed.", "model.generation_embeddings."),
    ("gen_aligner.layers.0.", "model.generation_aligner.fc1."),
    ("gen_aligner.layers.2.", "model.generation_aligner.hidden_layers.0."),
    ("gen_head.output_mlp_projector.", "model.generation_head.proj_out."),
    ("gen_head.vision_head.", "model.generation_head.vision_head."),
    ("aligner.layers.0.", "model.aligner.fc1."),
    ("aligner.layers.2.", "model.aligner.hidden_layers.0."),
    ("gen_vision_model.encoder.conv_blocks.{i}.res.", "model.vqmodel.encoder.down.{i}.block."),
    ("gen_vision_model.encoder.conv_blocks.", "model.vqmodel.encoder.down."),
    ("gen_vision_model.encoder.mid.0.", "model.vqmodel.encoder.mid.block_1."),
    ("gen_vision_model.encoder.mid.1.", "model.vqmodel.encoder.mid.attn_1."),
    ("gen_vision_model.encoder.mid.2.", "model.vqmodel.encoder.mid.block_2."),
    ("gen_vision_model.decoder.conv_blocks.{i}.res.", "model.vqmodel.decoder.up.{i}.block."),
    ("gen_vision_model.decoder.conv_blocks.", "model.vqmodel.decoder.up."),
    ("gen_vision_model.decoder.mid.0.", "model.vqmodel.decoder.mid.block_1."),
    ("gen_vision_model.decoder.mid.1.", "model.vqmodel.decoder.mid.attn_1."),
    ("gen_vision_model.decoder.mid.2.", "model.vqmodel.decoder.mid.block_2."),
    ("gen_vision_model.", "model.vqmodel."),
    (
        "vision_model.vision_tower.patch_embed.proj.",
        "model.vision_model.embeddings.patch_embedding.",
    ),
    ("vision_model.vision_tower.norm.", "model.vision_model.post_layernorm."),
    (
        "vision_model.vision_tower.blocks.{i}.attn.proj.",
        "model.vision_model.encoder.layers.{i}.self_attn.projection_layer.",
    ),
    (
        "vision_model.vision_tower.blocks.{i}.norm1.",
        "model.vision_model.encoder.layers.{i}.layer_norm1.",
    ),
    (
        "vision_model.vision_tower.blocks.{i}.norm2.",
        "model.vision_model.encoder.layers.{i}.layer_norm2.",
    ),
    ("vision_model.vision_tower.blocks.{i}.mlp.", "model.vision_model.encoder.layers.{i}.mlp."),
]

# Tensors that the transformers layout has no place for; no model here uses them.
ORIGINAL_ONLY = ("vision_model.vision_tower.attn_pool.", "gen_vision_model.quantize.codebook_used")

_POSITIONS = "vision_model.vision_tower.pos_embed"
_HF_POSITIONS = "model.vision_model.embeddings.position_embedding.weight"
_QKV = re.compile(r"vision_model\.vision_tower\.blocks\.(\d+)\.attn\.qkv\.(weight|bias)")
_HF_QKV = re.compile(
    r"model\.vision_model\.encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(weight|bias)"
)


def _rules(source: int) -> list[tuple[re.Pattern[str], str]]:
    rules = []
    for pair in PREFIXES:
        pattern = re.escape(pair[source]).replace(r"\{i\}", r"(\d+)")
        rules.append((re.compile(pattern), pair[1 - source].replace("{i}", r"\1")))
    return rules


_TO_TRANSFORMERS, _TO_ORIGINAL = _rules(0), _rules(1)


def _rename(name: str, rules: list[tuple[re.Pattern[str], str]]) -> str:
    for pattern, replacement in rules:
        match = pattern.match(name)
        if match:
            return match.expand(replacement) + name[match.end() :]
    return name


def to_transformers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the original layout under transformers' names; nothing is copied.

    The fused vision q, k, v becomes three views. Names without a counterpart stay as they are.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        qkv = _QKV.fullmatch(name)
        if qkv:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                prefix = f"model.vision_model.encoder.layers.{qkv[1]}.self_attn"
                renamed[f"{prefix}.{letter}_proj.{qkv[2]}"] = part
        elif name == _POSITIONS:
            renamed[_HF_POSITIONS] = tensor.squeeze(0)
        elif name.startswith(ORIGINAL_ONLY):
            renamed[name] = tensor
        else:
            renamed[_rename(name, _TO_TRANSFORMERS)] = tensor
    return renamed


def to_original(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `to_transformers`."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        qkv = _HF_QKV.fullmatch(name)
        if qkv:
            if qkv[2] == "q":
                parts = [tensors[name.replace(".q_proj.", f".{letter}_proj.")] for letter in "qkv"]
                fused = f"vision_model.vision_tower.blocks.{qkv[1]}.attn.qkv.{qkv[3]}"
                renamed[fused] = torch.cat(parts)
        elif name == _HF_POSITIONS:
            renamed[_POSITIONS] = tensor[None]
        else:
            renamed[_rename(name, _TO_ORIGINAL)] = tensor
    return renamed
