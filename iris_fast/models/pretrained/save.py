"""Write a Janus model folder, in the transformers or in the original layout.

`layouts/LAYOUT/` holds the files that are not weights. A JSON string "$path" there stands for a
value: an attribute of the `JanusConfig` (`$config.decoder.hidden_size`), of the `JanusTokenizer`
(`$tokenizer.bos_id`), `$dtype`, `$mlp_ratio` or `$vision_model_name`. Three choices are deliberate:

- `tie_word_embeddings` is false: transformers' default would overwrite one weight with another.
- `generation_kwargs.boi_token_id` is where transformers' image generation reads it, or fails.
- `vision_config.num_attention_heads` is not part of the original layout; `load` reads it.
"""

import json
import os
import re
import shutil
import string
import uuid
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from iris_fast.errors import UserError
from iris_fast.models.janus import JanusConfig
from iris_fast.models.pretrained.config_json import read_config
from iris_fast.models.pretrained.load import VQ_PREFIX, LoadedJanus
from iris_fast.models.pretrained.names import ORIGINAL_ONLY, to_original
from iris_fast.models.pretrained.weights import write_tensors

TEMPLATES = Path(__file__).with_name("layouts")
LAYOUTS = ("transformers", "original")

# Kept as they are when a model is written in the layout that it was read in.
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
    loaded: LoadedJanus,
    path: str | Path,
    layout: str = "transformers",
    dtype: torch.dtype | None = None,
) -> Path:
    """Write `loaded` as a complete model folder at `path` and return it.

    layout: "transformers" opens with `JanusForConditionalGeneration.from_pretrained`, untied;
        "original" is that of the published Janus files. Tensors that only the original layout
        has (the vision tower's attn_pool, the VQ's codebook_used: no code reads them) are left out
        if the model was loaded without them.
    dtype: casts every floating-point tensor; None leaves each as it is.

    The folder is written under a temporary name, read back, compared, and then renamed, so `path`
    is never incomplete. UserError if `path` exists and is not empty, or cannot be written.
    """
    if layout not in LAYOUTS:
        raise UserError(f"layout: {layout!r} does not exist; choose transformers or original")
    target = Path(path)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists already; remove it or choose another folder")
    tensors = _tensors(loaded, layout, dtype)
    stored_dtype = dtype or next(iter(loaded.model.parameters())).dtype
    partial = target.parent / f".{target.name}.{uuid.uuid4().hex}"
    try:
        partial.mkdir(parents=True)
        for name, text in _texts(loaded, layout, stored_dtype).items():
            (partial / name).write_text(text, encoding="utf-8", newline="\n")
        write_tensors(tensors, partial)
        read_config(partial)
        os.replace(partial, target)
    except OSError as error:
        raise UserError(f"cannot write {target} ({error}); check space and permissions") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _tensors(loaded: LoadedJanus, layout: str, dtype: torch.dtype | None) -> dict[str, Tensor]:
    tensors = dict(loaded.model.state_dict())
    tensors |= {VQ_PREFIX + name: t for name, t in loaded.vq.state_dict().items()}
    for name, tensor in loaded.untouched.items():  # the others were checked when they were loaded
        if tensor.is_floating_point() and not tensor.isfinite().all():
            remedy = "start from an intact copy of the model"
            raise UserError(
                f"tensor {name}, which is only passed on, holds NaN or infinity; {remedy}"
            )
    tensors |= loaded.untouched
    if layout == "original":
        tensors = to_original(tensors)
    else:
        tensors = {k: v for k, v in tensors.items() if not k.startswith(ORIGINAL_ONLY)}
    if dtype is not None:
        tensors = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors.items()}
    return tensors


def _texts(loaded: LoadedJanus, layout: str, dtype: torch.dtype) -> dict[str, str]:
    """The content of every file that is not weights, by name."""
    # transformers adds no BOS by itself to a byte-level tokenizer: its file has to.
    texts = {"tokenizer.json": loaded.tokenizer.json_text(add_bos=layout == "transformers")}
    for file in (TEMPLATES / layout).iterdir():
        texts[file.name] = file.read_text(encoding="utf-8")
        if file.suffix == ".json":
            data = layout_json(layout, file.name, loaded.config, dtype, loaded.tokenizer)
            texts[file.name] = json.dumps(data, indent=2, ensure_ascii=False)
    if loaded.path is not None and loaded.layout == layout:
        for name in _KEPT_FILES:
            if (loaded.path / name).is_file():
                texts[name] = (loaded.path / name).read_text(encoding="utf-8")
    return texts


def layout_json(
    layout: str, name: str, config: JanusConfig, dtype: torch.dtype, tokenizer: Any = None
) -> dict:
    """The JSON file `name` of `layout`; the original config.json needs no tokenizer."""
    values = {
        "config": config,
        "tokenizer": tokenizer,
        "dtype": str(dtype).removeprefix("torch."),
        "mlp_ratio": config.vision.mlp_size / config.vision.hidden_size,
        "vision_model_name": f"siglip_large_patch{config.vision.patch_size}_{config.image_size}",
    }

    def value(match: re.Match[str]) -> str:
        return json.dumps(string.Formatter().get_field(match[1], (), values)[0])

    text = (TEMPLATES / layout / name).read_text(encoding="utf-8")
    return json.loads(re.sub(r'"\$([\w.\[\]]+)"', value, text))
