"""Stage B of pretraining: the Janus decoder, on captions, codes and chains of thought.

The sequences are those of a rollout (`iris_fast.rollout.sampler`), packed by
`iris_fast.grpo.packing`:
- [image prompt, codes] for every scene. Some prompts include a chain of thought; some are replaced
  by padding, which trains the unconditional model for guidance.
- [CoT prompt, CoT, EOS] for a few scenes of each batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from torch import Tensor, nn

from iris_fast.grpo.packing import pack
from iris_fast.models.decoder import DecoderConfig
from iris_fast.models.janus import Janus, JanusConfig, VisionConfig
from iris_fast.models.pretrained.load import LoadedJanus
from iris_fast.models.templates import (
    TEMPLATES,
    fill_instruction,
    image_prompt_ids,
    join_prompt,
    load_instruction,
    unconditional_ids,
)
from iris_fast.models.tokenizer import JanusTokenizer
from iris_fast.models.vq import VQModel
from iris_fast.records import PackedBatch, Rollout
from iris_fast.rollout.sampler import empty_trace
from iris_fast.tiny.build import VOCAB_SIZE, build_random_tiny
from iris_fast.tiny.captions import chain_of_thought, random_caption
from iris_fast.tiny.recipe.pretrain_vq import VQ_CONFIG
from iris_fast.tiny.recipe.training import (
    StageProgress,
    load_state,
    save_state,
    set_learning_rate,
)
from iris_fast.tiny.world import IMAGE_SIZE, Scene

CONFIG = JanusConfig(
    decoder=DecoderConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        intermediate_size=512,
        num_layers=4,
        num_heads=6,
        num_kv_heads=6,
        head_dim=32,
        max_positions=1024,
    ),
    vq=VQ_CONFIG,
    vision=VisionConfig(
        hidden_size=32, num_layers=1, num_heads=2, mlp_size=64, patch_size=8, num_positions=64
    ),
    image_size=IMAGE_SIZE,
)
TEMPLATE = TEMPLATES["janus-pro"]
WEIGHT_STD = 0.02
PAIR_KINDS = ("two_object", "position", "color_attr")


@dataclass(frozen=True)
class Phase:
    """Steps under one learning rate schedule, `steps_per_block` of them on each block of scenes.

    Ten epochs over a block overfit: the loss on its scenes fell to 0.96 while the loss on new
    scenes stayed at 1.31. New blocks cost the time to encode them.
    """

    steps: int
    learning_rate: float
    first_block: int
    steps_per_block: int
    cot_sequences: int  # scenes per batch whose chain of thought is trained
    pairs: float = 0.5  # share of scenes with two different objects, the hard ones

    def block(self, step: int) -> int:
        """The block of scenes that a step of this phase uses."""
        return self.first_block + step // self.steps_per_block


@dataclass(frozen=True)
class DecoderRecipe:
    """Phases and sizes of stage B."""

    phases: tuple[Phase, ...] = (
        Phase(12000, 1.2e-3, first_block=0, steps_per_block=12000, cot_sequences=4),
        Phase(3600, 8e-4, first_block=1, steps_per_block=1200, cot_sequences=2),
        Phase(3000, 6e-4, first_block=1, steps_per_block=1000, cot_sequences=3, pairs=0.8),
    )
    batch_size: int = 16
    weight_decay: float = 0.02
    dropped: float = 0.1  # share of prompts replaced by padding, for guidance
    with_cot: float = 0.4  # share of image prompts that include a chain of thought
    text_weight: float = 0.5  # weight of a text token's loss relative to an image token's
    seed: int = 12


Block = tuple[list[Scene], Tensor]  # scenes and their codes [N, I]


def train_decoder(
    block: Callable[[int], Block],
    vq: VQModel,
    path: Path,
    recipe: DecoderRecipe,
    progress: StageProgress,
) -> LoadedJanus:
    """Train the decoder on the blocks that `block` returns; resume from `path` if it exists."""
    loaded = build_untrained(vq, recipe.seed)
    janus = loaded.model
    matrices = [p for p in janus.parameters() if p.dim() > 1]
    vectors = [p for p in janus.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}]
    groups += [{"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    step = 0
    if path.is_file():
        state = load_state(path)
        janus.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    total = sum(phase.steps for phase in recipe.phases)
    while step < total:
        phase, phase_step = phase_at(recipe, step)
        scenes, codes = block(phase.block(phase_step))
        rng = np.random.default_rng((recipe.seed, step))
        chosen = choose_scenes(scenes, recipe.batch_size, phase.pairs, rng)
        batch = [scenes[i] for i in chosen]
        packed = make_batch(
            batch, codes[chosen], loaded.tokenizer, recipe, phase.cot_sequences, rng
        )
        set_learning_rate(optimizer, phase.learning_rate, phase_step, phase.steps)
        with torch.autocast("cpu", torch.bfloat16):
            text, image = janus(packed)
        image_loss, text_loss = -image.logprob.mean(), -text.logprob.mean()
        share = recipe.text_weight * text.logprob.numel() / image.logprob.numel()
        optimizer.zero_grad()
        (image_loss + share * text_loss).backward()
        torch.nn.utils.clip_grad_norm_(janus.parameters(), 1.0)
        optimizer.step()
        step += 1
        progress.log("decoder", step, total, image=image_loss.item(), text=text_loss.item())
        if progress.save_is_due() or step == total:
            save_state(path, model=janus.state_dict(), optimizer=optimizer.state_dict(), step=step)
    return loaded


def choose_scenes(
    scenes: list[Scene], count: int, pairs: float, rng: Generator
) -> NDArray[np.int64]:
    """Sample indices of `count` scenes; each has two different objects with probability `pairs`."""
    is_pair = np.array([scene.kind in PAIR_KINDS for scene in scenes])
    probabilities = np.where(is_pair, pairs / is_pair.sum(), (1 - pairs) / (~is_pair).sum())
    return rng.choice(len(scenes), size=count, p=probabilities)


def phase_at(recipe: DecoderRecipe, step: int) -> tuple[Phase, int]:
    """The phase that contains a step, and the step's number within it."""
    for phase in recipe.phases:
        if step < phase.steps:
            return phase, step
        step -= phase.steps
    raise ValueError("step: the recipe has fewer steps")


def build_untrained(vq: VQModel, seed: int) -> LoadedJanus:
    """The untrained model with a trained VQ; its image embeddings start as the scaled codebook."""
    loaded = build_random_tiny(seed, config=CONFIG)
    loaded.vq.load_state_dict(vq.state_dict())
    janus: Janus = loaded.model
    aligner = set(janus.model.generation_aligner.modules())
    rows = vq.quantize.lookup(torch.arange(CONFIG.vq.codebook_size))
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in janus.modules():
            # The aligner keeps torch's initialisation, as in Janus: 0.02 would be too small.
            if isinstance(module, nn.Linear) and module in aligner:
                module.reset_parameters()
            elif isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=WEIGHT_STD)
        janus.model.generation_embeddings.weight.copy_(rows * CONFIG.vq.codebook_dim**0.5)
    return loaded


def make_batch(
    scenes: list[Scene],
    codes: Tensor,
    tokenizer: JanusTokenizer,
    recipe: DecoderRecipe,
    cot_sequences: int,
    rng: Generator,
) -> PackedBatch:
    """Packed sequences of these scenes, in the format of a rollout."""
    count = len(scenes)
    image_prompts: list[list[int]] = []
    cot_prompts: list[list[int]] = [[] for _ in scenes]
    cots: list[list[int]] = [[] for _ in scenes]
    for index, scene in enumerate(scenes):
        text, cot = random_caption(scene, rng).text, chain_of_thought(scene)
        if index < cot_sequences:
            cot_prompts[index], cots[index] = cot_task(text, cot, tokenizer)
        if rng.random() < recipe.with_cot:
            text = join_prompt(text, cot)
        ids = image_prompt_ids(tokenizer, TEMPLATE, text)
        dropped = rng.random() < recipe.dropped
        image_prompts.append(unconditional_ids(ids, tokenizer) if dropped else ids)
    rollout = Rollout(
        prompts=[],
        sample_numbers=[],
        seed=recipe.seed,
        cot_prompt_ids=cot_prompts,
        cot_ids=cots,
        cot_texts=[],
        truncated=[False] * count,
        image_prompt_ids=image_prompts,
        unconditional_prompt_ids=[[]] * count,
        codes_NI=codes,
        text=empty_trace(count),
        image=empty_trace(count),
    )
    return pack(rollout)[0]


def cot_task(text: str, cot: str, tokenizer: JanusTokenizer) -> tuple[list[int], list[int]]:
    """Token ids of the CoT prompt, and of the answer with its end token."""
    prompt = TEMPLATE.cot_prompt(fill_instruction(load_instruction(), text))
    # The prompt ends in ":", so the answer starts with a space.
    return tokenizer.encode(prompt), [*tokenizer.encode(f" {cot}")[1:], tokenizer.eos_id]
