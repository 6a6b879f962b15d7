"""Writing a Janus checkpoint folder, in the transformers or in the original layout."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from iris_fast.errors import UserError
from iris_fast.models.pretrained.config_json import (
    original_config,
    read_config,
    transformers_config,
)
from iris_fast.models.pretrained.load import LoadedJanus
from iris_fast.models.pretrained.names import ORIGINAL_ONLY, to_original
from iris_fast.models.pretrained.weights import write_tensors

# Turns of the form `ROLE: text`, as iris_fast.models.templates writes them.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message.content is string -%}
{%- set text = message.content -%}
{%- else -%}
{%- set text = message.content | selectattr('type', 'equalto', 'text') | map(attribute='text')
 | join('') -%}
{%- endif -%}
{%- if message.role == 'system' -%}
{{ text | trim }}{{ '\\n\\n' }}
{%- else -%}
{{ message.role }}: {{ text | trim }}
{%- if message.role in ['<|Assistant|>', 'Assistant'] -%}
{{ eos_token }}
{%- else -%}
{{ '\\n\\n' }}
{%- endif -%}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|Assistant|>:' }}
{%- endif -%}
"""

# Kept as they are when a checkpoint goes back into the layout it came from.
_KEPT_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "processor_config.json",
    "preprocessor_config.json",
    "chat_template.jinja",
    "chat_template.json",
)


def save_janus(
    checkpoint: LoadedJanus,
    path: str | Path,
    layout: str = "transformers",
    *,
    model_state: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
    max_shard_size: str | int = "5GB",
) -> Path:
    """Writes `checkpoint` as a complete folder at `path` and returns it.

    layout: "transformers" opens with `JanusForConditionalGeneration.from_pretrained`, untied;
        "original" is that of the published Janus files. Tensors that only the original layout
        has (the vision tower's attn_pool, the VQ's codebook_used: no code reads them) are absent
        where the checkpoint came without them.
    model_state: the policy's full state dict if it is not `checkpoint.model`'s own (gathered from
        shards, merged with adapters).
    dtype: casts every tensor; None leaves each as it is.

    Written beside `path`, re-opened, compared, and only then renamed into place: `path` is never
    half a checkpoint. UserError if it exists and is not empty, or cannot be written.
    """
    if layout not in ("transformers", "original"):
        raise UserError(f"no layout {layout!r}: choose transformers or original")
    target = Path(path)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists already: remove it or choose another folder")
    tensors = _tensors(checkpoint, layout, model_state, dtype)
    stored = dtype or next(iter(checkpoint.model.parameters())).dtype
    aside = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        aside.chmod(0o777 & ~_umask())
        for name, text in _texts(checkpoint, layout, stored).items():
            (aside / name).write_text(text, encoding="utf-8", newline="\n")
        write_tensors(tensors, aside, max_shard_size)
        read_config(aside)
        os.replace(aside, target)
    except OSError as error:
        raise UserError(f"cannot write {target} ({error}): check space and permissions") from error
    finally:
        if aside is not None and aside.exists():
            shutil.rmtree(aside, ignore_errors=True)
    return target


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _tensors(
    checkpoint: LoadedJanus,
    layout: str,
    model_state: Mapping[str, Tensor] | None,
    dtype: torch.dtype | None,
) -> dict[str, Tensor]:
    expected = checkpoint.model.state_dict()
    state = expected if model_state is None else model_state
    if set(state) != set(expected):
        odd = sorted(set(state) ^ set(expected))
        raise ValueError(f"model_state is not the policy's: {odd[:3]} missing or unknown")
    tensors = dict(state)
    tensors |= {f"model.vqmodel.{k}": v for k, v in checkpoint.vq.state_dict().items()}
    for name, tensor in checkpoint.untouched.items():  # the others were looked at when opened
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise UserError(
                f"tensor {name}, which is carried along and not run, holds NaN or infinity: start "
                "from an intact copy of the checkpoint"
            )
    tensors |= checkpoint.untouched
    if layout == "original":
        tensors = to_original(tensors)
    else:
        tensors = {k: v for k, v in tensors.items() if not k.startswith(ORIGINAL_ONLY)}
    if dtype is not None:
        tensors = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors.items()}
    return tensors


def _texts(checkpoint: LoadedJanus, layout: str, dtype: torch.dtype) -> dict[str, str]:
    """Every file that is not weights, by name."""
    write = _transformers_files if layout == "transformers" else _original_files
    texts = {
        name: data if isinstance(data, str) else json.dumps(data, indent=2, ensure_ascii=False)
        for name, data in write(checkpoint, dtype).items()
    }
    if checkpoint.path is not None and checkpoint.layout == layout:
        for name in _KEPT_FILES:
            source = checkpoint.path / name
            if source.is_file():
                texts[name] = source.read_text(encoding="utf-8")
    return texts


def _images() -> dict[str, Any]:
    return {
        "background_color": [127, 127, 127],
        "do_normalize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "min_size": 14,
        "rescale_factor": 1 / 255,
    }


def _transformers_files(checkpoint: LoadedJanus, dtype: torch.dtype) -> dict[str, Any]:
    config, tokenizer = checkpoint.config, checkpoint.tokenizer
    ids = {
        "bos": tokenizer.bos_id,
        "eos": tokenizer.eos_id,
        "pad": tokenizer.pad_id,
        "image": tokenizer.image_placeholder_id,
    }
    size = config.image_size
    return {
        "config.json": transformers_config(config, ids, dtype),
        "generation_config.json": {
            "bos_token_id": ids["bos"],
            "eos_token_id": ids["eos"],
            "pad_token_id": ids["pad"],
            "guidance_scale": 5.0,
            # Image generation reads it here and fails without.
            "generation_kwargs": {"boi_token_id": tokenizer.image_start_id},
        },
        # transformers adds no BOS by itself to a byte-level tokenizer: its file has to.
        "tokenizer.json": tokenizer.json_text(add_bos=True),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": config.decoder.max_positions,
            "clean_up_tokenization_spaces": False,
            "padding_side": "left",
            "processor_class": "JanusProcessor",
            **tokenizer.specials,
        },
        "special_tokens_map.json": {
            name: tokenizer.specials[name] for name in ("bos_token", "eos_token", "pad_token")
        },
        "processor_config.json": {
            "processor_class": "JanusProcessor",
            "num_image_tokens": config.vision.num_positions,
            "image_processor": {
                "image_processor_type": "JanusImageProcessor",
                "do_resize": True,
                "do_rescale": True,
                "do_pad": True,
                "resample": 3,
                "size": {"height": size, "width": size},
                **_images(),
            },
        },
        "chat_template.jinja": CHAT_TEMPLATE,
    }


def _original_files(checkpoint: LoadedJanus, dtype: torch.dtype) -> dict[str, Any]:
    config, tokenizer = checkpoint.config, checkpoint.tokenizer
    named = {name: tokenizer.specials[name] for name in ("bos_token", "eos_token", "pad_token")}
    others = sorted(set(tokenizer.special_strings) - set(named.values()))
    return {
        "config.json": original_config(config, dtype),
        "tokenizer.json": tokenizer.json_text(),
        "tokenizer_config.json": {
            **named,
            "unk_token": None,
            "clean_up_tokenization_spaces": False,
            "model_max_length": config.decoder.max_positions,
            "tokenizer_class": "LlamaTokenizer",
            "use_default_system_prompt": True,
        },
        "special_tokens_map.json": {**named, "additional_special_tokens": others},
        "processor_config.json": {
            "processor_class": "VLChatProcessor",
            "add_special_token": False,
            "ignore_id": -100,
            "image_tag": tokenizer.specials["image_token"],
            "mask_prompt": True,
            "num_image_tokens": config.vision.num_positions,
            "sft_format": "deepseek",
        },
        "preprocessor_config.json": {
            "processor_class": "VLChatProcessor",
            "image_processor_type": "VLMImageProcessor",
            "image_size": config.image_size,
            **_images(),
        },
    }
