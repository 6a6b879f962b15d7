"""One whole GRPO step: chain of thought, images, rewards, reference, forward, backward, AdamW, and
the new weights in the sampler's copy. Against the same step as T2I-R1 takes it.

Weights are random, the reward is the NSC of text and image, all chains of thought are equally long.
Both sides train the same micro-batches. Peak memory is all that a step holds, weights and optimizer
included. `hours_for_800_steps`, the paper's training, is the measured step 800 times.

The floor is that of the rollout and of the training, one after the other:

    decoding   a step reads the blocks and the head in use once, and the live keys and values, a
               prefix that several sequences share once; or computes 2 operations a parameter and
               sequence, where that takes longer
    prompts    2 operations a parameter and token, a shared prefix once
    training   6 operations a parameter and token and those of attention, 4 where a weight is
               frozen; 2 for the reference
    optimizer  7 numbers of 4 bytes a trained parameter (weight, gradient and two moments read,
               three of them written), then each weight read and written in the compute dtype
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from bench import _models
from bench._case import check_close
from bench._measure import Bench
from bench._rows import Measured, Row, dtype_name, make_row
from bench._t2i_r1 import T2IR1, Drawn, image_logprobs, text_logprobs
from iris_fast import distributed
from iris_fast.config import TrainConfig
from iris_fast.distributed import Ranks
from iris_fast.grpo.advantage import group_advantages
from iris_fast.grpo.fsdp import full
from iris_fast.grpo.micro_batches import log_probs, prepare
from iris_fast.grpo.optimizer import make_optimizer
from iris_fast.grpo.policy import build_models
from iris_fast.grpo.update import Learner
from iris_fast.models.janus import Janus, JanusConfig
from iris_fast.models.pretrained.load import LoadedJanus
from iris_fast.models.templates import TEMPLATES, fill_instruction, load_instruction
from iris_fast.models.vq import VQModel
from iris_fast.preflight.inputs import Inputs
from iris_fast.records import Prompt, Scored
from iris_fast.rewards.score import Scorer, load_rewards

SUITE = "step"
PEER = "T2I-R1's step"
PROMPT_WORDS = 60  # with the template 64 tokens, as in the other suites
RUNS = 3
PAPER_STEPS = 800
GPU_MODELS = ("1B",)


class Size(NamedTuple):
    """Of a step: prompts, images of each, tokens of a chain of thought, prompts a micro-batch."""

    prompts: int
    group: int
    cot: int
    batch: int


GPU_SIZE, CPU_SIZE = Size(8, 8, 128, 2), Size(2, 4, 16, 1)


class Phases(NamedTuple):
    """Seconds of a step's two halves."""

    rollout: float
    training: float


class Step(Protocol):
    """What is timed: two calls."""

    def rollout(self) -> Any: ...

    def train(self, drawn: Any) -> Any: ...


def rows(bench: Bench) -> Iterator[Row]:
    gpu = bench.device.type == "cuda"
    sizes = _models.sizes(bench.device)
    with distributed.start("auto", timeout_s=600) as ranks:
        for model in GPU_MODELS if gpu else sizes:
            yield from measure(bench, ranks, model, sizes[model], GPU_SIZE if gpu else CPU_SIZE)


def profiles(bench: Bench) -> None:
    """Our step."""
    with distributed.start("auto", timeout_s=600) as ranks:
        _profile(bench, ranks)


def _profile(bench: Bench, ranks: Ranks) -> None:
    """In a function of its own: no sharded tensor may outlive the process group."""
    gpu = bench.device.type == "cuda"
    sizes = _models.sizes(bench.device)
    for model in GPU_MODELS if gpu else sizes:
        ours = Ours(sizes[model], settings(GPU_SIZE if gpu else CPU_SIZE, gpu), ranks)
        bench.profile(f"{SUITE}/{model}", lambda ours=ours: ours.train(ours.rollout()))


def settings(size: Size, bf16: bool) -> TrainConfig:
    """The paper's, at this size."""
    return TrainConfig(
        model="random",
        prompts="random",
        cot=True,
        bf16=bf16,
        max_completion_length=size.cot,
        num_generations=size.group,
        per_device_train_batch_size=size.batch,
        gradient_accumulation_steps=size.prompts // size.batch,
        lr_scheduler_type="constant",
    )


def make_texts(prompts: int, group: int, first: int = 0) -> list[str]:
    """Prompts of numbers, each `group` times; `first`: how many other prompts came before."""
    generator = torch.Generator().manual_seed(first)
    drawn = torch.randint(10, 400, (prompts, PROMPT_WORDS), generator=generator)
    return [" ".join(map(str, words)) for words in drawn.tolist() for _ in range(group)]


def measure(
    bench: Bench, ranks: Ranks, model: str, janus: JanusConfig, size: Size
) -> Iterator[Row]:
    """Rows of the step, its halves, its images a second, and the paper's training."""
    gpu = bench.device.type == "cuda"
    config = settings(size, gpu)
    phases: dict[str, Phases] = {}
    seen: list[Seen] = []

    def measure_ours() -> Measured:
        ours = Ours(janus, config, ranks)
        seen.append(ours.first_step())
        phases["ours"], measured = timed(bench, ours, RUNS)
        return measured

    def measure_peer() -> Measured:
        peer = Peer(janus, config, bench.device)
        check(peer, seen[0])
        peer.warm_up()
        phases[PEER], measured = timed(bench, peer, 1 if gpu else RUNS)
        return measured

    found = bench.compare(f"step {model}", {"ours": measure_ours, PEER: measure_peer})
    floor = floor_phases(bench, janus, config, size)
    shape = {"model": model, "P": size.prompts, "G": size.group, "cot": size.cot}
    shape |= {"tokens": janus.image_tokens}
    yield from make_rows(shape, config, found, phases, floor)


def timed(bench: Bench, step: Step, runs: int) -> tuple[Phases, Measured]:
    """Median seconds of the halves and of the whole, and on a GPU the most that was allocated."""
    gpu = bench.device.type == "cuda"
    if gpu:
        bench.release()
        torch.cuda.reset_peak_memory_stats()

    def now() -> float:
        if gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    seconds = []
    for _ in range(runs):
        started = now()
        drawn = step.rollout()
        drawn_at = now()
        step.train(drawn)
        seconds.append(Phases(drawn_at - started, now() - drawn_at))
    peak = torch.cuda.max_memory_allocated() if gpu else None
    halves = Phases(*(statistics.median(half) for half in zip(*seconds, strict=True)))
    return halves, Measured(statistics.median(sum(each) for each in seconds), peak)


def make_rows(
    shape: dict[str, Any],
    config: TrainConfig,
    found: dict[str, Measured],
    phases: dict[str, Phases],
    floor: Phases,
) -> Iterator[Row]:
    """One row a metric. `found`: seconds of a step by name, ours first; `phases`: its halves."""
    images = config.prompts_per_step * config.num_generations
    dtype = torch.bfloat16 if config.bf16 else torch.float32
    hours = PAPER_STEPS / 3600

    def halves(place: int) -> dict[str, Measured]:
        return {
            name: whole._replace(value=phases[name][place] if name in phases else None)
            for name, whole in found.items()
        }

    least = sum(floor)
    for metric, unit, best, results in (
        ("step", "s", least, found),
        ("rollout", "s", floor.rollout, halves(0)),
        ("training", "s", floor.training, halves(1)),
        ("images", "images/s", images / least, {n: m.inverse(images) for n, m in found.items()}),
        (
            f"hours_for_{PAPER_STEPS}_steps",
            "h",
            least * hours,
            {name: whole.times(hours) for name, whole in found.items()},
        ),
    ):
        peers = {name: result for name, result in results.items() if name != "ours"}
        yield make_row(
            SUITE, "GRPO", shape, dtype, metric, unit, results["ours"], floor=best, peers=peers
        )


# --- The floor ------------------------------------------------------------------------------------


class Tokens(NamedTuple):
    """Of a sample: the prompt that asks for text, the text, the prompt of the image, the image."""

    asked: int
    text: int
    prompt: int
    image: int


def tokens_of(janus: JanusConfig, config: TrainConfig) -> Tokens:
    """Of every sample, as all are equally long."""
    (text,) = make_texts(1, 1)
    encode = _models.Numbers(janus.decoder.vocab_size).encode
    template = TEMPLATES[config.template]
    instruction = fill_instruction(load_instruction(config.cot_instruction), text)
    length = config.max_completion_length
    return Tokens(
        asked=len(encode(template.cot_prompt(instruction))),
        text=length,
        prompt=len(encode(template.image_prompt(text))) + 1 + length,  # and the stop between
        image=janus.image_tokens,
    )


def floor_phases(bench: Bench, janus: JanusConfig, config: TrainConfig, size: Size) -> Phases:
    """The least seconds of both halves on this machine; see the top of the file."""
    dtype = torch.bfloat16 if config.bf16 else torch.float32
    copy, rate = bench.copy_bytes_per_second, bench.flops_per_second[dtype_name(dtype)]
    tokens, item = tokens_of(janus, config), dtype.itemsize
    with torch.device("meta"):
        shapes = Janus(janus)
    blocks, text_head, image_head = (
        sum(p.numel() for p in module.parameters())
        for module in (
            shapes.model.language_model.layers, shapes.lm_head, shapes.model.generation_head
        )
    )  # fmt: skip
    embeds = shapes.model.language_model.embed_tokens.weight.numel()
    decoder, samples = janus.decoder, size.prompts * size.group
    slot = 2 * decoder.num_layers * decoder.num_kv_heads * decoder.head_dim * item

    def decoding(head: int, sequences: int, shared: float, steps: int) -> float:
        live = shared + sequences * steps / 2
        moved = ((blocks + head) * item + slot * live) / copy
        return steps * max(moved, 2 * (blocks + head) * sequences / rate)

    asked, drawn = size.prompts * tokens.asked, (samples + 1) * tokens.prompt
    rollout = (
        2 * blocks * (asked + drawn) / rate
        + decoding(text_head, samples, asked, tokens.text)
        + decoding(image_head, 2 * samples, drawn, tokens.image)
    )
    sequences = tokens.asked + tokens.text - 1, tokens.prompt + tokens.image - 1
    heads = 8 * text_head * tokens.text + 6 * image_head * tokens.image
    width = decoder.num_layers * decoder.num_heads * decoder.head_dim
    attention = 8 * width * sum(length**2 for length in sequences)
    flops = samples * (8 * blocks * sum(sequences) + heads + attention)
    trained = blocks + text_head + embeds
    return Phases(rollout, flops / rate + trained * (7 * 4 + 4 + item) / copy)


# --- Ours and the peer ----------------------------------------------------------------------------


class Seen(NamedTuple):
    """What our first step drew and computed, on the CPU: the peer must find the same."""

    scored: Scored
    logprobs: Tensor  # of the first micro-batch: all of text, then all of the image
    norm: float  # of the whole gradient
    gradient: Tensor  # of one weight, clipped


class Ours:
    """The trainer's own functions, in the order of its loop."""

    def __init__(self, janus: JanusConfig, config: TrainConfig, ranks: Ranks) -> None:
        policy = _models.make_model(janus, ranks.device, torch.float32).requires_grad_(True)
        tokenizer = _models.Numbers(janus.decoder.vocab_size)
        opened = LoadedJanus(policy, VQModel(janus.vq), tokenizer, janus, {})
        self.config, self.ranks = config, ranks
        self.models = build_models(Inputs(opened, [], janus.image_tokens), config, ranks)
        optimizer = make_optimizer(self.models.policy, config)
        self.learner = Learner(self.models.policy, self.models.reference, optimizer, config, ranks)
        self._scorer = Scorer.of(config, load_rewards(config.reward_funcs), [], list)
        count = config.prompts_per_step
        texts = make_texts(count, config.num_generations, first=ranks.rank * count)
        self._prompts = [Prompt(text) for text in texts]
        self._numbers = [ranks.rank * len(texts) + n for n in range(len(texts))]

    def rollout(self) -> Scored:
        rollout = self.models.sampler.rollout(self._prompts, self._numbers)
        rewards = self._scorer.score(rollout)
        advantages = group_advantages(
            self.ranks.gather(rewards.total_N),
            self.config.num_generations,
            self.config.scale_rewards,
        )
        return Scored.of(rollout, rewards, self.ranks.own_part(advantages))

    def train(self, scored: Scored) -> float:
        """The gradient's norm."""
        metrics = self.learner.update(self.learner.prepare(scored, None), step=0)
        self.learner.copy_weights_to(self.models.sampler.janus)
        return metrics["grad_norm"]

    def first_step(self) -> Seen:
        """A step, and what the peer is compared with."""
        models, scored = self.models, self.rollout()
        batches = prepare(scored, models.policy, None, self.config, self.ranks)
        logprobs = log_probs(models.policy, batches[0].packed).cpu()
        watched = models.policy.model.language_model.layers[0].self_attn.o_proj.weight
        gradients: list[Tensor] = []
        hook = self.learner.optimizer.register_step_pre_hook(
            lambda *_: gradients.append(full(watched.grad).cpu())
        )
        norm = self.train(scored)
        hook.remove()
        return Seen(scored, logprobs, norm, gradients[0])


class Peer:
    """T2I-R1's step from the same weights and prompts."""

    def __init__(self, janus: JanusConfig, config: TrainConfig, device: torch.device) -> None:
        dtype = torch.bfloat16 if config.bf16 else torch.float32
        # Drawn in float32 and then rounded, as ours are.
        weights = _models.make_model(janus, device, torch.float32).to(dtype)
        self.model = T2IR1(weights, _models.Numbers(janus.decoder.vocab_size), config)
        self._texts = make_texts(config.prompts_per_step, config.num_generations)
        self._image_tokens = janus.image_tokens
        self.train = self.model.train

    def rollout(self) -> Drawn:
        return self.model.rollout(self._texts, self._image_tokens)

    def warm_up(self) -> None:
        """A rollout of few image tokens; the comparison of gradients has warmed the training."""
        self.model.rollout(self._texts, 4)


def check(peer: Peer, seen: Seen) -> None:
    """The peer's log-probs of our tokens and its gradient are ours; WrongResult otherwise."""
    rollout, model = seen.scored.rollout, peer.model
    drawn = Drawn(
        text_prompts=torch.tensor(rollout.cot_prompt_ids),
        text=torch.tensor(rollout.cot_ids),
        image_prompts=torch.tensor(rollout.image_prompt_ids),
        codes=rollout.codes_NI,
        advantages=seen.scored.advantage_N,
    )
    drawn = Drawn(*(field.to(model.device) for field in drawn))
    config = model.config
    batch = next(drawn.cut(config.per_device_train_batch_size * config.num_generations))
    with torch.no_grad():
        text = text_logprobs(model.policy, batch.text_prompts, batch.text)
        image = image_logprobs(model.policy, batch.image_prompts, batch.codes)
    logprobs = torch.cat([text.flatten(), image.flatten()]).cpu()
    check_close("logprob", logprobs, seen.logprobs, 2e-2 if config.bf16 else 1e-4)
    # In bfloat16 the peer adds its micro-batches up in bfloat16, ours in float32.
    allowed = 0.1 if config.bf16 else 1e-3
    norm = torch.tensor(model.train(drawn))
    check_close("norm of the gradient", norm, torch.tensor(seen.norm), allowed)
    check_close("gradient", model.gradient().cpu(), seen.gradient, allowed)
