"""One whole GRPO step: chain of thought, images, rewards, reference, forward, backward, AdamW, and
copying the new weights to the sampler. The peer is the same step as in T2I-R1.

Weights are random, the reward is the NSC of text and image, all chains of thought have the same
length. Both sides train the same micro-batches. Peak memory is everything that a step holds,
including weights and optimizer. `hours_for_800_steps`, the paper's training, is the measured step
times 800.

The floor is the sum of the floors of rollout and training:

    decoding   a step reads the blocks and the head in use once, and the live keys and values, a
               prefix that several sequences share once; or computes 2 operations per parameter and
               sequence, if that takes longer
    prompts    2 operations per parameter and token, a shared prefix once
    training   6 operations per parameter and token (4 if the weight is frozen), those of attention,
               and 2 per parameter and token for the reference
    optimizer  7 numbers of 4 bytes per trained parameter (weight, gradient and two moments read,
               all but the gradient written), then each weight read in float32 and written in the
               compute dtype
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from bench.harness.case import check_close
from bench.harness.measure import Bench
from bench.harness.rows import Measured, Row, dtype_name, make_row
from bench.trainer.models import NumberTokenizer, make_model, model_configs
from bench.trainer.t2i_r1 import T2IR1, Samples, image_logprobs, text_logprobs
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
PROMPT_WORDS = 60  # 64 tokens with the template, as in the other suites
RUNS = 3
PAPER_STEPS = 800


class Size(NamedTuple):
    """Prompts, images per prompt, tokens of a chain of thought, prompts per micro-batch."""

    prompts: int
    group: int
    cot: int
    batch: int


GPU_SIZE, CPU_SIZE = Size(8, 8, 128, 2), Size(2, 4, 16, 1)


class Phases(NamedTuple):
    """Seconds of a step's two phases."""

    rollout: float
    training: float


class Step(Protocol):
    """What is timed: the two phases."""

    def rollout(self) -> Any: ...

    def train(self, rollout: Any) -> Any: ...


def rows(bench: Bench) -> Iterator[Row]:
    gpu = bench.device.type == "cuda"
    sizes = model_configs(bench.device)
    with distributed.start("auto", timeout_s=600) as ranks:
        for model in chosen_models(bench):
            yield from measure(bench, ranks, model, sizes[model], GPU_SIZE if gpu else CPU_SIZE)


def profiles(bench: Bench) -> None:
    """Our step."""
    with distributed.start("auto", timeout_s=600) as ranks:
        _profile(bench, ranks)


def _profile(bench: Bench, ranks: Ranks) -> None:
    """A separate function, because no sharded tensor may outlive the process group."""
    gpu = bench.device.type == "cuda"
    sizes = model_configs(bench.device)
    for model in chosen_models(bench):
        ours = Ours(sizes[model], settings(GPU_SIZE if gpu else CPU_SIZE, gpu, model), ranks)
        bench.profile(f"{SUITE}/{model}", lambda ours=ours: ours.train(ours.rollout()))


def chosen_models(bench: Bench) -> list[str]:
    """On a GPU 1B, and 7B only if --model asks for it: it needs torchao, and more time."""
    names = bench.models(model_configs(bench.device))
    if "1B" in names:
        names = ["1B"]
    return [name for name in names if bench.wants(f"GRPO step {name}")]


def settings(size: Size, bf16: bool, model: str = "1B") -> TrainConfig:
    """The paper's settings at this size; those of the preset that make 7B fit one GPU."""
    large = model == "7B"
    return TrainConfig(
        gradient_checkpointing=large,
        optim="adamw_torch_8bit" if large else "adamw_torch",
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
    """Prompts made of numbers, each `group` times; `first` is the index of the first prompt."""
    generator = torch.Generator().manual_seed(first)
    words_PW = torch.randint(10, 400, (prompts, PROMPT_WORDS), generator=generator).tolist()
    return [" ".join(map(str, words)) for words in words_PW for _ in range(group)]


def measure(
    bench: Bench, ranks: Ranks, model: str, janus: JanusConfig, size: Size
) -> Iterator[Row]:
    """Rows for the step, its phases, its images per second, and the paper's training."""
    gpu = bench.device.type == "cuda"
    config = settings(size, gpu, model)
    phases: dict[str, Phases] = {}
    first_steps: list[FirstStep] = []

    def measure_ours() -> Measured:
        ours = Ours(janus, config, ranks)
        first_steps.append(ours.first_step())
        phases["ours"], measured = timed(bench, ours, RUNS)
        return measured

    def measure_peer() -> Measured:
        peer = Peer(janus, config, bench.device)
        check(peer, first_steps[0])
        peer.warm_up()
        phases[PEER], measured = timed(bench, peer, 1 if gpu else RUNS)
        return measured

    found = bench.compare(f"step {model}", {"ours": measure_ours, PEER: measure_peer})
    floor = floor_phases(bench, janus, config, size)
    shape = {"model": model, "P": size.prompts, "G": size.group, "cot": size.cot}
    shape |= {"tokens": janus.image_tokens}
    yield from make_rows(shape, config, found, phases, floor)


def timed(bench: Bench, step: Step, runs: int) -> tuple[Phases, Measured]:
    """Median seconds of the phases and of the whole, and on a GPU the peak of allocated memory."""
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
        rollout = step.rollout()
        rollout_done = now()
        step.train(rollout)
        seconds.append(Phases(rollout_done - started, now() - rollout_done))
    peak = torch.cuda.max_memory_allocated() if gpu else None
    phases = Phases(*(statistics.median(phase) for phase in zip(*seconds, strict=True)))
    return phases, Measured(statistics.median(sum(each) for each in seconds), peak)


def make_rows(
    shape: dict[str, Any],
    config: TrainConfig,
    found: dict[str, Measured],
    phases: dict[str, Phases],
    floor: Phases,
) -> Iterator[Row]:
    """One row per metric. `found`: seconds of a step by name, ours first; `phases`: its parts."""
    images = config.prompts_per_step * config.num_generations
    dtype = torch.bfloat16 if config.bf16 else torch.float32
    hours = PAPER_STEPS / 3600

    def phase(which: str) -> dict[str, Measured]:
        return {
            name: whole._replace(value=getattr(phases[name], which) if name in phases else None)
            for name, whole in found.items()
        }

    least = sum(floor)
    for metric, unit, best, results in (
        ("step", "s", least, found),
        ("rollout", "s", floor.rollout, phase("rollout")),
        ("training", "s", floor.training, phase("training")),
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
    """Numbers of tokens per sample; all samples have the same lengths."""

    cot_prompt: int
    cot: int
    image_prompt: int
    image: int


def token_counts(janus: JanusConfig, config: TrainConfig) -> Tokens:
    (text,) = make_texts(1, 1)
    encode = NumberTokenizer(janus.decoder.vocab_size).encode
    template = TEMPLATES[config.template]
    instruction = fill_instruction(load_instruction(config.cot_instruction), text)
    length = config.max_completion_length
    return Tokens(
        cot_prompt=len(encode(template.cot_prompt(instruction))),
        cot=length,
        image_prompt=len(encode(template.image_prompt(text))) + 1 + length,  # "PROMPT. COT"
        image=janus.image_tokens,
    )


def floor_phases(bench: Bench, janus: JanusConfig, config: TrainConfig, size: Size) -> Phases:
    """Minimum seconds of both phases on this machine, as in the module docstring."""
    dtype = torch.bfloat16 if config.bf16 else torch.float32
    copy, rate = bench.copy_bytes_per_second, bench.flops_per_second[dtype_name(dtype)]
    tokens, item = token_counts(janus, config), dtype.itemsize
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

    cot_prompts = size.prompts * tokens.cot_prompt
    image_prompts = (samples + 1) * tokens.image_prompt  # the unconditional one is shared
    rollout = (
        2 * blocks * (cot_prompts + image_prompts) / rate
        + decoding(text_head, samples, cot_prompts, tokens.cot)
        + decoding(image_head, 2 * samples, image_prompts, tokens.image)
    )
    sequences = tokens.cot_prompt + tokens.cot - 1, tokens.image_prompt + tokens.image - 1
    heads = 8 * text_head * tokens.cot + 6 * image_head * tokens.image
    width = decoder.num_layers * decoder.num_heads * decoder.head_dim
    attention = 8 * width * sum(length**2 for length in sequences)
    flops = samples * (8 * blocks * sum(sequences) + heads + attention)
    trained = blocks + text_head + embeds
    return Phases(rollout, flops / rate + trained * (7 * 4 + 4 + item) / copy)


# --- Ours and the peer ----------------------------------------------------------------------------


class FirstStep(NamedTuple):
    """What our first step sampled and computed, on the CPU, for comparison with the peer."""

    scored: Scored
    logprobs: Tensor  # of the first micro-batch: all text tokens, then all image tokens
    norm: float  # of the whole gradient
    gradient: Tensor  # of one weight, after clipping


class Ours:
    """A step by the trainer's own functions, in the order of its loop."""

    def __init__(self, janus: JanusConfig, config: TrainConfig, ranks: Ranks) -> None:
        policy = make_model(janus, ranks.device, torch.float32).requires_grad_(True)
        tokenizer = NumberTokenizer(janus.decoder.vocab_size)
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
        """Returns the gradient's norm."""
        metrics = self.learner.update(self.learner.prepare(scored, None), step=0)
        self.learner.copy_weights_to(self.models.sampler.janus)
        return metrics["grad_norm"]

    def first_step(self) -> FirstStep:
        """Take a step and record what the peer is compared with."""
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
        return FirstStep(scored, logprobs, norm, gradients[0])


class Peer:
    """T2I-R1's step with the same weights and prompts."""

    def __init__(self, janus: JanusConfig, config: TrainConfig, device: torch.device) -> None:
        dtype = torch.bfloat16 if config.bf16 else torch.float32
        # Sampled in float32 and then rounded, as ours are.
        weights = make_model(janus, device, torch.float32).to(dtype)
        self.model = T2IR1(weights, NumberTokenizer(janus.decoder.vocab_size), config)
        self._texts = make_texts(config.prompts_per_step, config.num_generations)
        self._image_tokens = janus.image_tokens
        self.train = self.model.train

    def rollout(self) -> Samples:
        return self.model.rollout(self._texts, self._image_tokens)

    def warm_up(self) -> None:
        """A rollout of a few image tokens; `check` has already warmed up the training."""
        self.model.rollout(self._texts, 4)


def check(peer: Peer, ours: FirstStep) -> None:
    """Raise WrongResult unless the peer finds our log-probs and our gradient for our samples."""
    rollout, model = ours.scored.rollout, peer.model
    samples = Samples(
        text_prompts=torch.tensor(rollout.cot_prompt_ids),
        text=torch.tensor(rollout.cot_ids),
        image_prompts=torch.tensor(rollout.image_prompt_ids),
        codes=rollout.codes_NI,
        advantages=ours.scored.advantage_N,
    )
    samples = Samples(*(field.to(model.device) for field in samples))
    config = model.config
    batch = next(samples.micro_batches(config.per_device_train_batch_size * config.num_generations))
    with torch.no_grad():
        text = text_logprobs(model.policy, batch.text_prompts, batch.text)
        image = image_logprobs(model.policy, batch.image_prompts, batch.codes)
    logprobs = torch.cat([text.flatten(), image.flatten()]).cpu()
    check_close("logprob", logprobs, ours.logprobs, 2e-2 if config.bf16 else 1e-4)
    # With bf16 the peer accumulates its micro-batches in bfloat16, ours in float32.
    allowed = 0.1 if config.bf16 else 1e-3
    norm = torch.tensor(model.train(samples))
    check_close("norm of the gradient", norm, torch.tensor(ours.norm), allowed)
    check_close("gradient", model.gradient().cpu(), ours.gradient, allowed)
