"""Models of Janus-Pro's shapes with random weights, in our code and in transformers'."""

import re
from types import SimpleNamespace

import torch

from bench.harness import peers
from iris_fast.models.decoder import DecoderConfig
from iris_fast.models.janus import Janus, JanusConfig, VisionConfig
from iris_fast.models.pretrained.save import layout_json
from iris_fast.models.tokenizer import IMAGE_START as IMAGE_START_TEXT
from iris_fast.models.vq import VQConfig

PAD, BOS, IMAGE_START, OTHER = 0, 1, 2, 5  # arbitrary ids: the embeddings are random
# width, MLP width, layers, heads
GPU_SIZES = {"1B": (2048, 5632, 24, 16), "7B": (4096, 11008, 30, 32)}
CPU_SIZES = {"tiny": (128, 352, 4, 1)}


def model_configs(device: torch.device) -> dict[str, JanusConfig]:
    """Name -> config of the models measured on this device."""
    gpu = device.type == "cuda"
    return {name: _config(*size, gpu) for name, size in (GPU_SIZES if gpu else CPU_SIZES).items()}


def _config(width: int, mlp: int, layers: int, heads: int, real: bool) -> JanusConfig:
    """Janus-Pro's head width 128, 16384 codes of 16 x 16 pixels, 102400 words; or a small model."""
    image_size = 384 if real else 64
    return JanusConfig(
        decoder=DecoderConfig(
            vocab_size=102400 if real else 512,
            hidden_size=width,
            intermediate_size=mlp,
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=heads,
            head_dim=width // heads,
        ),
        vq=VQConfig(codebook_size=16384 if real else 256, codebook_dim=8),
        vision=VisionConfig(  # never run
            hidden_size=32,
            num_layers=1,
            num_heads=2,
            mlp_size=64,
            patch_size=16,
            num_positions=(image_size // 16) ** 2,
        ),
        image_size=image_size,
    )


def make_model(config: JanusConfig, device: torch.device, dtype: torch.dtype) -> Janus:
    """A frozen model with random weights, scaled so that logits are of order 1."""
    with torch.device("meta"):
        janus = Janus(config)
    janus.to(dtype).to_empty(device=device).requires_grad_(False)
    torch.manual_seed(0)
    for name, parameter in janus.named_parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=parameter.shape[-1] ** -0.5)
        else:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    return janus


def in_transformers(janus: Janus) -> torch.nn.Module:
    """Transformers' Janus with the same weights."""
    weight = janus.lm_head.weight
    transformers = peers.load("transformers", weight.device, needs_gpu=False)
    ids = SimpleNamespace(bos_id=BOS, eos_id=3, pad_id=PAD, image_placeholder_id=4)
    config = transformers.JanusConfig(
        **layout_json("transformers", "config.json", janus.config, weight.dtype, ids)
    )
    default = torch.get_default_dtype()
    torch.set_default_dtype(weight.dtype)
    try:
        with torch.device(weight.device):
            model = transformers.JanusForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(default)
    model.load_state_dict(janus.state_dict(), strict=False)
    return model.requires_grad_(False)


class NumberTokenizer:
    """A tokenizer for random weights: a number stands for its own id, any other word for OTHER.

    Decoding and encoding any ids returns the same ids. The end token lies outside the vocabulary,
    so that no model generates it: every chain of thought has the maximum length.
    """

    bos_id, pad_id, image_start_id = BOS, PAD, IMAGE_START

    def __init__(self, vocab_size: int) -> None:
        self.eos_id = vocab_size

    def encode(self, text: str) -> list[int]:
        words = re.findall(r"\d+|[^\s\d]+", text.replace(IMAGE_START_TEXT, f" {IMAGE_START}"))
        return [BOS, *(int(word) if word.isdigit() else OTHER for word in words)]

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))

    def strip_special(self, text: str) -> str:
        """The text itself: no number is a special token."""
        return text
