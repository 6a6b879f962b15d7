"""Tensor names of the two layouts, and the two tensors that also change shape.

Inside this package every name is the transformers one. `tensor_names.json` maps original prefixes
to those of transformers and is read in both directions; `{i}` stands for a layer number, and the
first match counts.
"""

import json
import re
from pathlib import Path

import torch
from torch import Tensor

# Tensors that the transformers layout has no place for; no model here uses them.
ORIGINAL_ONLY = ("vision_model.vision_tower.attn_pool.", "gen_vision_model.quantize.codebook_used")

_POSITIONS = "vision_model.vision_tower.pos_embed"
_HF_POSITIONS = "model.vision_model.embeddings.position_embedding.weight"
_QKV = re.compile(r"vision_model\.vision_tower\.blocks\.(\d+)\.attn\.qkv\.(weight|bias)")
_HF_QKV = re.compile(
    r"model\.vision_model\.encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(weight|bias)"
)


_TO_TRANSFORMERS: dict[str, str] = json.loads(
    Path(__file__).with_name("tensor_names.json").read_text(encoding="utf-8")
)
_TO_ORIGINAL = {new: old for old, new in _TO_TRANSFORMERS.items()}


def _rename(name: str, prefixes: dict[str, str]) -> str:
    for old, new in prefixes.items():
        pattern = re.escape(old).replace(r"\{i\}", r"(\d+)")
        if match := re.match(pattern, name):
            return match.expand(new.replace("{i}", r"\1")) + name[match.end() :]
    return name


def to_transformers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the original layout under transformers' names; nothing is copied.

    The fused vision q, k, v becomes three views. Names without a counterpart stay as they are.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if qkv := _QKV.fullmatch(name):
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
    """The inverse of `to_transformers`; the vision q, k, v are copied into one tensor."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        qkv = _HF_QKV.fullmatch(name)
        if qkv and qkv[2] == "q":
            parts = [tensors[name.replace(".q_proj.", f".{letter}_proj.")] for letter in "qkv"]
            fused = f"vision_model.vision_tower.blocks.{qkv[1]}.attn.qkv.{qkv[3]}"
            renamed[fused] = torch.cat(parts)
        elif name == _HF_POSITIONS:
            renamed[_POSITIONS] = tensor[None]
        elif not qkv:
            renamed[_rename(name, _TO_ORIGINAL)] = tensor
    return renamed
