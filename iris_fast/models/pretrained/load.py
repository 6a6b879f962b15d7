"""Opening a Janus checkpoint, in the original or in the transformers layout.

`iris_fast.models.pretrained.save` is the way back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from iris_fast.errors import UserError
from iris_fast.models.janus import Janus, JanusConfig
from iris_fast.models.pretrained.config_json import build_config, read_config
from iris_fast.models.pretrained.hub import resolve_model
from iris_fast.models.pretrained.names import to_transformers
from iris_fast.models.pretrained.weights import read_tensors
from iris_fast.models.tokenizer import JanusTokenizer
from iris_fast.models.vq import VQModel

__all__ = ["VQ_PREFIX", "LoadedJanus", "load_janus", "untouched_shapes"]

VQ_PREFIX = "model.vqmodel."
# What must not hold a tensor that no module here has; one would mean a misread config.
_OWN_PREFIXES = ("lm_head.", "model.language_model.", "model.generation_", VQ_PREFIX)


@dataclass
class LoadedJanus:
    """A Janus model with all that its checkpoint folder holds.

    `untouched` are the tensors that are carried along and not run: the vision tower and the
    understanding aligner under transformers' names, and whatever else the files held under the
    names it had. They may be mapped from the files of `path`, in their stored dtype.
    `layout` is the one that was read; `path` is None for a model made in memory.
    """

    model: Janus = field(repr=False)
    vq: VQModel = field(repr=False)
    tokenizer: JanusTokenizer
    config: JanusConfig
    untouched: dict[str, Tensor] = field(repr=False)
    layout: str = "transformers"
    path: Path | None = None


def load_janus(
    path: str | Path,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    config_overrides: Mapping[str, Any] | None = None,
) -> LoadedJanus:
    """Opens a checkpoint folder, or a hub id, of either layout.

    The weights of the policy and of the VQ are cast to `dtype`; the VQ is frozen.
    `config_overrides` replaces fields of `JanusConfig` by dotted name, for sizes that neither
    config nor weights tell. UserError names the file or tensor that is missing, damaged, of the
    wrong shape, or not finite.
    """
    folder = resolve_model(path)
    raw, layout = read_config(folder)
    tokenizer = JanusTokenizer.from_folder(folder)
    tensors = read_tensors(folder)
    if layout == "original":
        tensors = to_transformers(tensors)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    config = build_config(raw, layout, shapes, folder, config_overrides)
    with torch.device("meta"):
        model, vq = Janus(config), VQModel(config.vq)
    _check_shapes(model, vq, config, shapes, folder)
    if len(tokenizer) > config.decoder.vocab_size:
        raise UserError(
            f"{folder}: tokenizer.json has ids up to {len(tokenizer) - 1}, the model only "
            f"{config.decoder.vocab_size} rows: they belong to different checkpoints"
        )
    _fill(model, "", tensors, dtype, device, folder)
    _fill(vq, VQ_PREFIX, tensors, dtype, device, folder)
    vq.eval().requires_grad_(False)
    return LoadedJanus(model, vq, tokenizer, config, tensors, layout, folder)


def untouched_shapes(config: JanusConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the vision tower and its aligner: the tensors an export cannot lack."""
    vision, width = config.vision, config.decoder.hidden_size
    size, mlp, patch = vision.hidden_size, vision.mlp_size, vision.patch_size
    tower = "model.vision_model."
    shapes: dict[str, tuple[int, ...]] = {
        f"{tower}embeddings.position_embedding.weight": (vision.num_positions, size),
        f"{tower}embeddings.patch_embedding.weight": (size, 3, patch, patch),
        f"{tower}embeddings.patch_embedding.bias": (size,),
    }

    def linear(name: str, rows: int, columns: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (rows, columns), (rows,)

    def norm(name: str) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (size,), (size,)

    norm(f"{tower}post_layernorm")
    for i in range(vision.num_layers):
        layer = f"{tower}encoder.layers.{i}."
        for part in ("q_proj", "k_proj", "v_proj", "projection_layer"):
            linear(f"{layer}self_attn.{part}", size, size)
        norm(f"{layer}layer_norm1")
        norm(f"{layer}layer_norm2")
        linear(f"{layer}mlp.fc1", mlp, size)
        linear(f"{layer}mlp.fc2", size, mlp)
    linear("model.aligner.fc1", width, size)
    linear("model.aligner.hidden_layers.0", width, width)
    return shapes


def _check_shapes(
    model: Janus, vq: VQModel, config: JanusConfig, shapes: Mapping[str, torch.Size], folder: Path
) -> None:
    expected = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    expected |= {VQ_PREFIX + name: tuple(t.shape) for name, t in vq.state_dict().items()}
    expected |= untouched_shapes(config)
    missing = [name for name in expected if name not in shapes]
    if missing:
        hint = (
            "it was saved with tied embeddings, which Janus does not have; use another copy"
            if missing == ["lm_head.weight"]
            else "download it again"
        )
        raise UserError(f"{folder} lacks {_some(missing)}: {hint}")
    wrong = [name for name, shape in expected.items() if tuple(shapes[name]) != shape]
    if wrong:
        name = wrong[0]
        raise UserError(
            f"{folder}: {_some(wrong)} of unexpected shape ({name}: {list(shapes[name])}, expected "
            f"{list(expected[name])}): config.json and weights do not belong together"
        )
    extra = [
        name
        for name in shapes
        if name.startswith(_OWN_PREFIXES)
        and name not in expected
        and not name.endswith("rotary_emb.inv_freq")  # a constant that old versions saved
    ]
    if extra:
        raise UserError(
            f"{folder}: {_some(extra)} without a place in the model that config.json describes: "
            "config.json and weights do not belong together"
        )


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{'tensor' if len(names) == 1 else 'tensors'} {shown}{more}"


def _fill(
    module: nn.Module,
    prefix: str,
    tensors: dict[str, Tensor],
    dtype: torch.dtype,
    device: torch.device | str,
    folder: Path,
) -> None:
    """Moves the module's tensors out of `tensors` into it; UserError for one that is not finite.

    Each is released before the next is read, so that the files never lie in memory as a whole.
    """
    state = {}
    for name in module.state_dict():
        source = tensors.pop(prefix + name)
        if not source.is_floating_point():
            raise UserError(
                f"{folder}: tensor {prefix}{name} is {source.dtype}: "
                "quantised checkpoints are not supported"
            )
        # copy=True: never train on memory that is a file's.
        state[name] = source.to(device=device, dtype=dtype, copy=True)
        low, high = state[name].aminmax()
        if not (torch.isfinite(low) and torch.isfinite(high)):
            raise UserError(
                f"{folder}: tensor {prefix}{name} holds NaN or infinity: "
                "use an intact copy of the checkpoint"
            )
    module.load_state_dict(state, assign=True)
