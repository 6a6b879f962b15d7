"""Stage B of the recipe: the Janus decoder learns captions, codes and the chain of thought.

The sequences are those that `iris_fast.rollout.sampler` samples, packed as `iris_fast.grpo.update`
packs them:
[image prompt, codes], the prompt dropped for guidance now and then, half of the time with a chain
of thought behind it; and for a few scenes of each batch [CoT prompt, CoT, EOS].
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
from iris_fast.tiny.captions import caption_of, chain_of_thought
from iris_fast.tiny.recipe.pretrain_vq import VQ_CONFIG
from iris_fast.tiny.recipe.training import Course, load_state, save_state
from iris_fast.tiny.world import SIDE, Scene

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
    image_size=SIDE,
)
TEMPLATE = TEMPLATES["janus-pro"]
LLAMA_STD = 0.02
PAIR_KINDS = ("two_object", "position", "color_attr")


@dataclass(frozen=True)
class Phase:
    """Some steps under one course of the learning rate; `steps_per_block` on each block of scenes.

    A block that is seen ten times over is learnt by heart: the loss on its scenes fell to 0.96
    where that on fresh ones stayed at 1.31. Blocks that are seen once cost their encoding.
    """

    steps: int
    learning_rate: float
    first_block: int
    steps_per_block: int
    cot_sequences: int  # scenes of a batch whose chain of thought is itself learnt
    pairs: float = 0.5  # share of the scenes with two things, half of all: the hard ones

    def block(self, step: int) -> int:
        """The block of scenes that a step of this phase draws from."""
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
    dropped: float = 0.1  # share of prompts replaced by padding: the model's unconditional half
    with_cot: float = 0.4  # share of prompts that a chain of thought follows
    text_weight: float = 0.5  # of a text token's loss against an image token's
    seed: int = 12


Block = tuple[list[Scene], Tensor]  # scenes and their codes [N, I]


def train_decoder(
    block: Callable[[int], Block], vq: VQModel, path: Path, recipe: DecoderRecipe, course: Course
) -> LoadedJanus:
    """The model trained on numbered blocks of scenes; goes on from `path` if it exists."""
    checkpoint = start(vq, recipe.seed)
    janus = checkpoint.model
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
        phase, inside = phase_at(recipe, step)
        scenes, codes = block(phase.block(inside))
        rng = np.random.default_rng((recipe.seed, step))
        picks = pick(scenes, recipe.batch_size, phase.pairs, rng)
        picked = [scenes[i] for i in picks]
        packed = make_batch(
            picked, codes[picks], checkpoint.tokenizer, recipe, phase.cot_sequences, rng
        )
        course.set_rate(optimizer, phase.learning_rate, inside, phase.steps)
        with torch.autocast("cpu", torch.bfloat16):
            text, image = janus(packed)
        image_loss, text_loss = -image.logprob.mean(), -text.logprob.mean()
        share = recipe.text_weight * text.logprob.numel() / image.logprob.numel()
        optimizer.zero_grad()
        (image_loss + share * text_loss).backward()
        torch.nn.utils.clip_grad_norm_(janus.parameters(), 1.0)
        optimizer.step()
        step += 1
        course.tell("decoder", step, total, image=image_loss.item(), text=text_loss.item())
        if course.due() or step == total:
            save_state(path, model=janus.state_dict(), optimizer=optimizer.state_dict(), step=step)
    return checkpoint


def pick(scenes: list[Scene], count: int, pairs: float, rng: Generator) -> NDArray[np.int64]:
    """Numbers of `count` scenes, each with the chance `pairs` one of two different things."""
    is_pair = np.array([scene.kind in PAIR_KINDS for scene in scenes])
    odds = np.where(is_pair, pairs / is_pair.sum(), (1 - pairs) / (~is_pair).sum())
    return rng.choice(len(scenes), size=count, p=odds)


def phase_at(recipe: DecoderRecipe, step: int) -> tuple[Phase, int]:
    """The phase that a step is in, and its number inside it."""
    for phase in recipe.phases:
        if step < phase.steps:
            return phase, step
        step -= phase.steps
    raise ValueError("step: the recipe ends before it")


def start(vq: VQModel, seed: int) -> LoadedJanus:
    """The untrained model around a trained VQ; its image embedding starts as the codebook."""
    checkpoint = build_random_tiny(seed, config=CONFIG)
    checkpoint.vq.load_state_dict(vq.state_dict())
    janus: Janus = checkpoint.model
    aligner = set(janus.model.generation_aligner.modules())
    rows = vq.quantize.lookup(torch.arange(CONFIG.codebook_size))
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in janus.modules():
            # torch's own, as in Janus, for the aligner: 0.02 would make its output vanish.
            if isinstance(module, nn.Linear) and module in aligner:
                module.reset_parameters()
            elif isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=LLAMA_STD)
        janus.model.generation_embeddings.weight.copy_(rows * CONFIG.codebook_dim**0.5)
    return checkpoint


def make_batch(
    scenes: list[Scene],
    codes: Tensor,
    tokenizer: JanusTokenizer,
    recipe: DecoderRecipe,
    cot_sequences: int,
    rng: Generator,
) -> PackedBatch:
    """Packed sequences of these scenes, as if a rollout had drawn them."""
    count = len(scenes)
    image_prompts: list[list[int]] = []
    cot_prompts: list[list[int]] = [[] for _ in scenes]
    cots: list[list[int]] = [[] for _ in scenes]
    for index, scene in enumerate(scenes):
        text, cot = caption_of(scene, rng).text, chain_of_thought(scene)
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
    """Ids of the CoT prompt, and of the answer with its end token."""
    asked = TEMPLATE.cot_prompt(fill_instruction(load_instruction(), text))
    # The prompt ends in ":", so the answer starts with a space, as a turn's text does.
    return tokenizer.encode(asked), [*tokenizer.encode(f" {cot}")[1:], tokenizer.eos_id]
