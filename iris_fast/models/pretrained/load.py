"""Open a Janus model folder, in the original or in the transformers layout."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

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

VQ_PREFIX = "model.vqmodel."
# Prefixes under which an unknown tensor means that the config was misread.
_OWN_PREFIXES = ("lm_head.", "model.language_model.", "model.generation_", VQ_PREFIX)


@dataclass
class LoadedJanus:
    """A Janus model with everything that its folder holds.

    `untouched` are the tensors that are passed on and not run: the vision tower and the
    understanding aligner under transformers' names, and any others of the files under their own
    names. They may be mapped from the files of `path`, in their stored dtype, and so may those of
    the model (`load_janus` with dtype None).
    `layout` is the one that was read; `path` is None for a model made in memory.
    """

    model: Janus = field(repr=False)
    vq: VQModel = field(repr=False)
    tokenizer: JanusTokenizer
    config: JanusConfig
    untouched: dict[str, Tensor] = field(repr=False)
    layout: str = "transformers"
    path: Path | None = None


def load_janus(path: str | Path, dtype: torch.dtype | None = torch.float32) -> LoadedJanus:
    """Open a model folder, or a hub id, of either layout, on the CPU.

    The weights of the policy and of the VQ are cast to `dtype`; the VQ is frozen. With None the
    policy's stay mapped from the files, in their stored dtype, and take no memory: they are to be
    copied, not trained; the VQ is float32. UserError names the file or tensor that is missing,
    damaged, of the wrong shape, or not finite.
    """
    folder = resolve_model(path)
    raw, layout = read_config(folder)
    tokenizer = JanusTokenizer.from_folder(folder)
    tensors = read_tensors(folder)
    if layout == "original":
        tensors = to_transformers(tensors)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    config = build_config(raw, layout, shapes, folder)
    with torch.device("meta"):
        model, vq = Janus(config), VQModel(config.vq)
    expected = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    expected |= {VQ_PREFIX + name: tuple(t.shape) for name, t in vq.state_dict().items()}
    _check_shapes(shapes, expected | untouched_shapes(config), folder)
    if len(tokenizer) > config.decoder.vocab_size:
        raise UserError(
            f"{folder}: tokenizer.json has ids up to {len(tokenizer) - 1}, the model only "
            f"{config.decoder.vocab_size} rows; use files of one and the same model"
        )
    _fill(model, "", tensors, dtype, folder)
    _fill(vq, VQ_PREFIX, tensors, dtype or torch.float32, folder)
    vq.eval().requires_grad_(False)
    return LoadedJanus(model, vq, tokenizer, config, tensors, layout, folder)


def untouched_shapes(config: JanusConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the vision tower and its aligner, which every saved model needs."""
    sizes = asdict(config.vision) | {"decoder_width": config.decoder.hidden_size}
    # Their dimensions are numbers or the names of sizes; `{i}` stands for a layer number.
    table = json.loads(Path(__file__).with_name("vision_tensors.json").read_text(encoding="utf-8"))
    shapes = {}
    for name, dims in table.items():
        for layer in range(config.vision.num_layers if "{i}" in name else 1):
            shape = tuple(sizes[dim] if isinstance(dim, str) else dim for dim in dims)
            shapes[name.replace("{i}", str(layer))] = shape
    return shapes


def _check_shapes(
    shapes: Mapping[str, torch.Size], expected: Mapping[str, tuple[int, ...]], folder: Path
) -> None:
    """UserError unless `shapes` has those that are expected, and no other of the model's own."""
    missing = [name for name in expected if name not in shapes]
    if missing:
        remedy = "download it again"
        if missing == ["lm_head.weight"]:
            remedy = "it was saved with tied embeddings, unlike Janus; use another copy"
        raise UserError(f"{folder} lacks {_shorten(missing)}; {remedy}")
    wrong = [name for name, shape in expected.items() if tuple(shapes[name]) != shape]
    if wrong:
        name = wrong[0]
        raise UserError(
            f"{folder}: {_shorten(wrong)} of unexpected shape ({name}: {list(shapes[name])}, "
            f"expected {list(expected[name])}); config.json and weights do not belong together"
        )
    constant = "rotary_emb.inv_freq"  # which old versions of transformers saved
    own = [n for n in shapes if n.startswith(_OWN_PREFIXES) and not n.endswith(constant)]
    extra = [name for name in own if name not in expected]
    if extra:
        raise UserError(
            f"{folder}: {_shorten(extra)} without a place in the model that config.json describes; "
            "config.json and weights do not belong together"
        )


def _shorten(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{'tensor' if len(names) == 1 else 'tensors'} {', '.join(names[:3])}{more}"


def _fill(
    module: nn.Module,
    prefix: str,
    tensors: dict[str, Tensor],
    dtype: torch.dtype | None,
    folder: Path,
) -> None:
    """Move the module's tensors out of `tensors` into it; UserError for one that is not finite.

    Each is released before the next is read, so that the files are never in memory as a whole.
    With dtype None they are not copied.
    """
    state = {}
    for name in module.state_dict():
        source, where = tensors.pop(prefix + name), f"{folder}: tensor {prefix}{name}"
        if not source.is_floating_point():
            raise UserError(f"{where} is {source.dtype}; quantised models are not supported")
        # Copied, because the memory of a file must not be trained.
        state[name] = source if dtype is None else source.to(dtype, copy=True)
        low, high = state[name].aminmax()
        if not (torch.isfinite(low) and torch.isfinite(high)):
            raise UserError(f"{where} holds NaN or infinity; use an intact copy of the model")
    module.load_state_dict(state, assign=True)
