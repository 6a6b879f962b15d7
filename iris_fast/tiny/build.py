"""The tiny Janus: the real architecture, tokenizer and layouts, small enough for a CPU.

`build_tiny` opens the model of the package, which `iris_fast.tiny.recipe.pretrain` trained on the
synthetic world. `build_random_tiny` builds a smaller, untrained one for tests: 64 x 64 pixels,
8 x 8 image tokens, a codebook of 256, 4 layers of width 128.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn

from iris_fast.models.decoder import DecoderConfig
from iris_fast.models.janus import Janus, JanusConfig, VisionConfig
from iris_fast.models.pretrained.load import LoadedJanus, load_janus, untouched_shapes
from iris_fast.models.templates import load_instruction
from iris_fast.models.tokenizer import KNOWN_SPECIALS, JanusTokenizer
from iris_fast.models.vq import VQConfig, VQModel
from iris_fast.tiny.captions import prompt_sets
from iris_fast.tiny.world import COLOURS, SHAPES

MODEL_FOLDER = Path(__file__).with_name("model")

TEXT_TOKENS = 616  # 256 bytes and the merges learned from the prompts
VOCAB_SIZE = 640  # larger than the tokenizer, as in the real checkpoints
POSITIONS = "top left, top, top right, left, middle, right, bottom left, bottom, bottom right, "
EXTRA_SPECIALS = ["<patch_placeholder>", "<|User|>", "<|Assistant|>"]
WEIGHT_STD = 0.02
IMAGE_LOGIT_SCALE = 0.15

TINY_CONFIG = JanusConfig(
    decoder=DecoderConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=352,
        num_layers=4,
        num_heads=4,
        num_kv_heads=4,
        head_dim=32,
        max_positions=1024,
    ),
    vq=VQConfig(
        codebook_size=256,
        codebook_dim=8,
        latent_channels=32,
        base_channels=32,
        channel_multiplier=(1, 1, 1, 1),
        num_res_blocks=1,
    ),
    vision=VisionConfig(
        hidden_size=32, num_layers=1, num_heads=2, mlp_size=64, patch_size=8, num_positions=64
    ),
    image_size=64,
)


def build_tiny(dtype: torch.dtype | None = torch.float32) -> LoadedJanus:
    """Open the tiny Janus of the package, trained on the synthetic world; `dtype` as for
    `load_janus`."""
    return load_janus(MODEL_FOLDER, dtype)


def build_random_tiny(
    seed: int = 0, dtype: torch.dtype = torch.float32, config: JanusConfig = TINY_CONFIG
) -> LoadedJanus:
    """Build a tiny Janus with random weights that depend on `seed` alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, vq = Janus(config), VQModel(config.vq)
        for module in model.modules():
            _initialise(module)
        # Guidance scales the image logits; larger ones would leave a single likely token.
        model.model.generation_head.vision_head.weight.data *= IMAGE_LOGIT_SCALE
        untouched = {
            name: torch.randn(shape) * WEIGHT_STD
            for name, shape in untouched_shapes(config).items()
        }
    untouched = {name: tensor.to(dtype) for name, tensor in untouched.items()}
    vq.eval().requires_grad_(False)
    return LoadedJanus(
        model.to(dtype), vq.to(dtype), build_tokenizer(), config, untouched, "transformers", None
    )


def _initialise(module: nn.Module) -> None:
    """Initialise so that embeddings and logits have unit variance.

    With a standard deviation of 0.02, as in large models, distributions would be nearly uniform and
    rewards would differ by rounding alone. The VQ model keeps torch's initialisation.
    """
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if isinstance(module, nn.Linear):
        nn.init.normal_(weight, std=module.in_features**-0.5)
    if isinstance(module, nn.Embedding):
        nn.init.normal_(weight)
    if isinstance(module, nn.Linear) and bias is not None:
        nn.init.zeros_(bias)


def build_tokenizer() -> JanusTokenizer:
    """Train a byte-level BPE, with Janus's special tokens, on prompts and the CoT instruction."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TEXT_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    lines = [caption.text for captions in prompt_sets() for caption in captions]
    # Repeated, because every CoT prompt contains the whole instruction.
    lines += [load_instruction()] * 4
    lines += [f"{colour} {shape} {POSITIONS}" for colour in COLOURS for shape in SHAPES]
    backend.train_from_iterator(lines, trainer)
    specials = [*KNOWN_SPECIALS.values(), *EXTRA_SPECIALS]
    backend.add_special_tokens(
        [AddedToken(text, special=True, normalized=False) for text in specials]
    )
    return JanusTokenizer(backend, {})
