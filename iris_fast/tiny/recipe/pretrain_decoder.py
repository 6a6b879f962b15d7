"""Stage B of pretraining: the Janus decoder, on captions, codes and chains of thought.

The sequences are those of a rollout (`iris_fast.rollout.sampler`), packed by
`iris_fast.grpo.packing`:
- [image prompt, codes] for every scene. Some prompts include a chain of thought; some are replaced
  by padding, which trains the unconditional model for guidance.
- [CoT prompt, CoT, EOS] for a few scenes of each batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.random import Generator
from torch import Tensor, nn

from iris_fast.grpo.packing import pack
from iris_fast.models.attention import PackedAttention
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
from iris_fast.records import PackedBatch, Rollout
from iris_fast.rollout.sampler import empty_trace
from iris_fast.tiny.build import VOCAB_SIZE, build_random_tiny
from iris_fast.tiny.captions import chain_of_thought, random_caption
from iris_fast.tiny.recipe.construct_vq import VQ_CONFIG, construct_vq
from iris_fast.tiny.recipe.training import (
    StageProgress,
    load_state,
    save_state,
    set_learning_rate,
)
from iris_fast.tiny.world import (
    IMAGE_SIZE,
    KINDS,
    Scene,
    World,
    equally_likely,
    random_scene,
    scene_codes,
    tile_features,
)

CONFIG = JanusConfig(
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
    vq=VQ_CONFIG,
    vision=VisionConfig(
        hidden_size=32, num_layers=1, num_heads=2, mlp_size=64, patch_size=4, num_positions=64
    ),
    image_size=IMAGE_SIZE,
)
TEMPLATE = TEMPLATES["janus-pro"]
WEIGHT_STD = 0.02
KIND_SHARES = {
    "single_object": 1.0,
    "two_object": 1.5,
    "counting": 2.0,
    "colors": 2.0,
    "position": 3.0,
    "color_attr": 4.0,
}


@dataclass(frozen=True)
class DecoderRecipe:
    """Steps and sizes of stage B."""

    steps: int = 6000
    learning_rate: float = 2e-3
    batch_size: int = 16
    weight_decay: float = 0.02
    cot_sequences: int = 2  # scenes per batch whose chain of thought is trained
    dropped: float = 0.1  # share of prompts replaced by padding, for guidance
    with_cot: float = 0.5  # share of image prompts that include a chain of thought
    text_weight: float = 0.5  # weight of a text token's loss relative to an image token's
    label_smoothing: float = 3e-4  # of image tokens: the share of a target spread over all codes
    seed: int = 12


def train_decoder(
    loaded: LoadedJanus,
    path: Path,
    recipe: DecoderRecipe,
    world: World,
    progress: StageProgress,
) -> None:
    """Train the decoder of `loaded`, in place, on scenes of `world`; resume from `path`.

    A step's scenes depend on the recipe's seed and the step alone, so that a resumed run gives the
    same bits.
    """
    janus = loaded.model
    matrices = [p for p in janus.parameters() if p.dim() > 1]
    vectors = [p for p in janus.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": recipe.weight_decay}]
    groups += [{"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    alike = torch.from_numpy(equally_likely(world))
    step = 0
    if path.is_file():
        state = load_state(path)
        janus.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step = state["step"]
    while step < recipe.steps:
        rng = np.random.default_rng((recipe.seed, step))
        scenes = sample_scenes(recipe.batch_size, world, rng)
        packed = make_batch(scenes, loaded.tokenizer, recipe, rng)
        set_learning_rate(optimizer, recipe.learning_rate, step, recipe.steps)
        text_loss, image_loss = expected_losses(janus, packed, alike, recipe.label_smoothing)
        share = recipe.text_weight * len(packed.text_targets) / len(packed.image_targets)
        optimizer.zero_grad()
        (image_loss + share * text_loss).backward()
        torch.nn.utils.clip_grad_norm_(janus.parameters(), 1.0)
        optimizer.step()
        step += 1
        progress.log("decoder", step, recipe.steps, image=image_loss.item(), text=text_loss.item())
        if progress.save_is_due() or step == recipe.steps:
            save_state(path, model=janus.state_dict(), optimizer=optimizer.state_dict(), step=step)


def expected_losses(
    janus: Janus, packed: PackedBatch, alike: Tensor, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Mean cross-entropies of the text targets and of the image targets.

    The latter is the mean over the textures that a target's cell could have had as well: `alike`
    [K, n] names the codes. Its expectation is that of the plain cross-entropy, and it lacks the
    noise of textures, which nothing can predict. `label_smoothing` bounds the log-probs of codes
    that never follow: they fall as long as training lasts otherwise, and KL(U || p) is mostly
    theirs.
    """
    attention = PackedAttention(packed.sequence_lengths, alike.device, janus.attn_implementation)
    embeds = janus.embed_packed(packed)
    hidden = janus.hidden_states(embeds, packed.positions_T, attention)
    text = F.cross_entropy(janus.text_logits(hidden[packed.text_rows]), packed.text_targets)
    log_probs = janus.image_logits(hidden[packed.image_rows]).log_softmax(-1)
    image = -log_probs.gather(1, alike[packed.image_targets]).mean()
    return text, (1 - label_smoothing) * image - label_smoothing * log_probs.mean()


def sample_scenes(count: int, world: World, rng: Generator) -> list[Scene]:
    """Sample `count` scenes, more of the kinds that are harder to learn."""
    shares = np.array([KIND_SHARES[kind] for kind in KINDS])
    kinds = rng.choice(len(KINDS), size=count, p=shares / shares.sum())
    return [random_scene(KINDS[kind], rng, world) for kind in kinds]


def build_untrained(seed: int) -> LoadedJanus:
    """The untrained model with the constructed VQ.

    Its image embeddings and the rows of its image head start as projections of the tiles' features,
    so that what is learned about a tile holds for similar ones.
    """
    loaded = build_random_tiny(seed, config=CONFIG)
    loaded.vq.load_state_dict(construct_vq().state_dict())
    janus: Janus = loaded.model
    aligner = set(janus.model.generation_aligner.modules())
    features = torch.from_numpy(tile_features())
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for module in janus.modules():
            # The aligner keeps torch's initialisation, as in Janus: 0.02 would be too small.
            if isinstance(module, nn.Linear) and module in aligner:
                module.reset_parameters()
            elif isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=WEIGHT_STD)
        # Tokens of text and of images start equally large, next to what the blocks add.
        nn.init.normal_(janus.model.language_model.embed_tokens.weight)
        embeddings = janus.model.generation_embeddings.weight
        head = janus.model.generation_head.vision_head.weight
        for weight, std in ((embeddings, 0.5), (head, WEIGHT_STD)):
            weight.copy_(features @ (torch.randn(features.shape[1], weight.shape[1]) * std))
    return loaded


def make_batch(
    scenes: list[Scene], tokenizer: JanusTokenizer, recipe: DecoderRecipe, rng: Generator
) -> PackedBatch:
    """Packed sequences of these scenes, in the format of a rollout."""
    count = len(scenes)
    image_prompts: list[list[int]] = []
    cot_prompts: list[list[int]] = [[] for _ in scenes]
    cots: list[list[int]] = [[] for _ in scenes]
    for index, scene in enumerate(scenes):
        text, cot = random_caption(scene, rng).text, chain_of_thought(scene)
        if index < recipe.cot_sequences:
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
        codes_NI=torch.from_numpy(scene_codes(scenes)),
        text=empty_trace(count),
        image=empty_trace(count),
    )
    return pack(rollout)[0]


def cot_task(text: str, cot: str, tokenizer: JanusTokenizer) -> tuple[list[int], list[int]]:
    """Token ids of the CoT prompt, and of the answer with its end token."""
    prompt = TEMPLATE.cot_prompt(fill_instruction(load_instruction(), text))
    # The prompt ends in ":", so the answer starts with a space.
    return tokenizer.encode(prompt), [*tokenizer.encode(f" {cot}")[1:], tokenizer.eos_id]
