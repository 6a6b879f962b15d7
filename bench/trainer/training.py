"""The training pass at Janus-Pro shapes: image log-probs of packed sequences, forward and backward.

Operations: 6 per parameter and token in the decoder's blocks, 4 per parameter and image token in
the head, and 6 L^2 D per block for the causal attention of a sequence of L tokens.
`fraction_of_floor` is the MFU: for time and tokens relative to the matmul rate measured in the same
run, for the row named MFU relative to the 989 TFLOP/s of an H100's or H200's data sheet.
Weights and gradients are in the compute dtype; there is no optimizer. Only the blocks are trained:
the head is frozen, as in the trainer, so that the floor excludes its weight gradient.

All sequences have the same length here, so that peers without packing waste nothing on padding.
"""

import contextlib
import copy
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.models.llama import modeling_llama

from bench.harness import peers
from bench.harness.case import check_close
from bench.harness.measure import Bench
from bench.harness.rows import Measured, Row, dtype_name, make_row
from bench.trainer.models import in_transformers, make_model, model_configs
from bench.trainer.t2i_r1 import image_logprobs
from iris_fast.grpo.packing import pack
from iris_fast.models.attention import (
    IMPLEMENTATIONS,
    PackedAttention,
    resolve_implementation,
    unavailable,
)
from iris_fast.models.compilation import compile_blocks
from iris_fast.models.janus import Janus, JanusConfig
from iris_fast.records import PackedBatch, Rollout
from iris_fast.rollout.sampler import empty_trace

SUITE = "training"
PROMPT_TOKENS = 64
WARM_UPS, RUNS = 2, 5
DATA_SHEET = 989e12  # dense bf16 operations per second
GPU_SAMPLES, CPU_SAMPLES = {"1B": 32, "7B": 8}, {"tiny": 8}


class Inputs(NamedTuple):
    """Prompts [N, 64], codes [N, I], and upstream gradients of the log-probs [N, I]."""

    prompts: Tensor
    codes: Tensor
    upstream: Tensor


# inputs -> log-probs [N, I]
Forward = Callable[[Inputs], Tensor]


def rows(bench: Bench) -> Iterator[Row]:
    gpu = bench.device.type == "cuda"
    configs = model_configs(bench.device)
    for model in filter(lambda model: bench.wants(case_name(model)), bench.models(configs)):
        config = configs[model]
        yield from measure(bench, model, config, (GPU_SAMPLES if gpu else CPU_SAMPLES)[model])
        bench.release()


def profiles(bench: Bench) -> None:
    """Our pass and transformers', for each model."""
    counts = GPU_SAMPLES if bench.device.type == "cuda" else CPU_SAMPLES
    configs = model_configs(bench.device)
    for model in filter(lambda model: bench.wants(case_name(model)), bench.models(configs)):
        config = configs[model]
        for name in ("ours", "transformers"):
            inputs = make_inputs(config, counts[model], bench.device)
            run = CANDIDATES[name](make_policy(config, bench.device), inputs)

            def whole(run: Pass = run) -> None:
                run.forget()
                run()

            bench.profile(f"{SUITE}/{name}, {model} N={counts[model]}", whole)
            del run, whole
            bench.release()


def case_name(model: str) -> str:
    """What --case looks in."""
    return f"training pass {model}"


def make_policy(config: JanusConfig, device: torch.device) -> Janus:
    """A model whose blocks alone are trained."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    janus = make_model(config, device, dtype)
    janus.attn_implementation = resolve_implementation(
        "auto", device, dtype, config.decoder.head_dim
    )
    janus.model.language_model.layers.requires_grad_(True)
    return janus


def measure(bench: Bench, model: str, config: JanusConfig, samples: int) -> Iterator[Row]:
    """Rows of one model: time of a pass, tokens per second, and on a GPU operations per second
    relative to the data sheet of an H100 or H200."""
    janus = make_policy(config, bench.device)
    dtype = janus.lm_head.weight.dtype
    inputs = make_inputs(config, samples, bench.device)

    def measure_one(name: str) -> Measured:
        with unpatched():
            return timed(bench, candidates[name](janus, inputs), inputs, janus)

    candidates = CANDIDATES | variants(janus)
    results = bench.compare(
        f"training {model}", {name: partial(measure_one, name) for name in candidates}
    )
    length = PROMPT_TOKENS + config.image_tokens - 1
    operations, tokens = flops(janus, samples), samples * length
    least = operations / bench.flops_per_second[dtype_name(dtype)]
    conversions: list[tuple[str, str, float, Callable[[Measured], Measured]]] = [
        ("forward+backward", "ms", 1e3 * least, lambda found: found.times(1e3)),
        ("tokens", "tokens/s", tokens / least, lambda found: found.inverse(tokens)),
    ]
    if bench.device.type == "cuda":
        rate = ("MFU", "TFLOP/s", DATA_SHEET / 1e12, lambda found: found.inverse(operations / 1e12))
        conversions.append(rate)
    for metric, unit, floor, convert in conversions:
        found = {name: convert(result) for name, result in results.items()}
        yield make_row(
            SUITE, "training pass", {"model": model, "N": samples, "L": length}, dtype, metric,
            unit, found.pop("ours"), floor=floor, peers=found,
        )  # fmt: skip


def timed(bench: Bench, run: "Pass", inputs: Inputs, janus: Janus) -> Measured:
    """Check, then measure the median seconds, and on a GPU the peak bytes of a call."""
    check(janus, inputs, *run())
    seconds = []
    for _ in range(WARM_UPS + RUNS):
        run.forget()
        started = time.perf_counter()
        run()
        if bench.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    peak = None
    if bench.device.type == "cuda":
        run.forget()
        peak = bench.clock.peak_bytes(run)
    run.forget()
    return Measured(statistics.median(seconds[WARM_UPS:]), peak)


def flops(janus: Janus, samples: int) -> int:
    """Operations of forward and backward pass, without the frozen head's weight gradient."""
    config, image_tokens = janus.config.decoder, janus.config.image_tokens
    length = PROMPT_TOKENS + image_tokens - 1
    blocks = sum(p.numel() for p in janus.model.language_model.layers.parameters())
    head = sum(p.numel() for p in janus.model.generation_head.parameters())
    attention = config.num_layers * config.num_heads * config.head_dim * length**2
    return samples * (6 * blocks * length + 4 * head * image_tokens + 6 * attention)


def make_inputs(config: JanusConfig, samples: int, device: torch.device) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    tokens = config.image_tokens
    sampled = [
        torch.randint(10, 400, (samples, PROMPT_TOKENS), generator=generator),
        torch.randint(0, config.vq.codebook_size, (samples, tokens), generator=generator),
        torch.randn(samples, tokens, generator=generator),
    ]
    return Inputs(*(t.to(device) for t in sampled))


class Pass:
    """Forward and backward pass of one implementation, which trains `blocks`."""

    def __init__(self, blocks: torch.nn.ModuleList, forward: Forward, inputs: Inputs):
        self._blocks, self._forward, self._inputs = blocks, forward, inputs

    def __call__(self) -> tuple[Tensor, Tensor]:
        """Log-probs, and the gradient of one weight in the first block."""
        logprobs = self._forward(self._inputs)
        logprobs.backward(self._inputs.upstream.to(logprobs.dtype))
        return logprobs.detach(), self._blocks[0].self_attn.o_proj.weight.grad

    def forget(self) -> None:
        """Drop all gradients."""
        for parameter in self._blocks.parameters():
            parameter.grad = None


# --- Ours and the peers ---------------------------------------------------------------------------


def ours(
    janus: Janus, inputs: Inputs, attention: str | None = None, compiled: bool = False
) -> Pass:
    """The trainer's pass: packed, head rows through linear_token_stats; with the attention that
    `auto` selects, or a given one."""
    packed = packed_batch(inputs)
    if attention or compiled:
        janus = copy.deepcopy(janus)
        janus.attn_implementation = attention or janus.attn_implementation
    if compiled:
        compile_blocks(janus.model.language_model)

    def forward(_: Inputs) -> Tensor:
        return janus(packed)[1].logprob.view(inputs.codes.shape)

    return Pass(janus.model.language_model.layers, forward, inputs)


def variants(janus: Janus) -> dict[str, Callable[[Janus, Inputs], Pass]]:
    """On a GPU, ours with every other attention that works here and with compiled blocks, to
    compare with the default settings."""
    weight, head_dim = janus.lm_head.weight, janus.config.decoder.head_dim
    if not weight.is_cuda:
        return {}
    working = [
        n for n in IMPLEMENTATIONS if not unavailable(n, weight.device, weight.dtype, head_dim)
    ]
    variants = {
        f"ours, {name}": partial(ours, attention=name)
        for name in working
        if name != janus.attn_implementation
    }
    return variants | {"ours, compiled blocks": partial(ours, compiled=True)}


def packed_batch(inputs: Inputs) -> PackedBatch:
    count = len(inputs.prompts)
    rollout = Rollout(
        prompts=[],
        sample_numbers=[],
        seed=0,
        cot_prompt_ids=[[]] * count,
        cot_ids=[[]] * count,
        cot_texts=[],
        truncated=[False] * count,
        image_prompt_ids=inputs.prompts.tolist(),
        unconditional_prompt_ids=[[] for _ in inputs.prompts],
        codes_NI=inputs.codes.cpu(),
        text=empty_trace(count),
        image=empty_trace(count),
    )
    return pack(rollout)[0].to(inputs.prompts.device)


@contextlib.contextmanager
def unpatched() -> Iterator[None]:
    """Undo changes to transformers' Llama module at the end of the `with` block.

    Liger replaces names in that module, which would change every model built or run afterwards.
    """
    names = vars(modeling_llama)
    before = dict(names)
    try:
        yield
    finally:
        names.update(before)


def transformers(janus: Janus, inputs: Inputs, liger: bool = False) -> Pass:
    """transformers' decoder on a batch, with log-softmax over all image logits in float32."""
    model = in_transformers(janus)
    if liger:
        kernels = peers.load("liger_kernel.transformers", inputs.prompts.device)
        kernels.apply_liger_kernel_to_llama(
            rope=True, swiglu=True, rms_norm=True, cross_entropy=False,
            fused_linear_cross_entropy=False, model=model.model.language_model,
        )  # fmt: skip
    blocks = model.model.language_model.layers.requires_grad_(True)

    def forward(inputs: Inputs) -> Tensor:
        return image_logprobs(model, inputs.prompts, inputs.codes)

    return Pass(blocks, forward, inputs)


CANDIDATES = {
    "ours": ours,
    "transformers": transformers,
    "transformers + liger": partial(transformers, liger=True),
}


def check(janus: Janus, inputs: Inputs, logprobs: Tensor, gradient: Tensor) -> None:
    """Compare with plain torch: our decoder, log-softmax over all logits in float32."""
    packed = packed_batch(inputs)
    attention = PackedAttention(packed.sequence_lengths, logprobs.device)
    hidden = janus.hidden_states(janus.embed_packed(packed), packed.positions_T, attention)
    logits = janus.image_logits(hidden.index_select(0, packed.image_rows)).float()
    reference = logits.log_softmax(-1).gather(-1, packed.image_targets[:, None])
    reference = reference.view(inputs.codes.shape)
    first = janus.model.language_model.layers[0].self_attn.o_proj.weight
    (expected,) = torch.autograd.grad(reference, first, inputs.upstream)
    allowed = 1e-3 if first.dtype == torch.float32 else 5e-2
    check_close("logprob", logprobs, reference.detach(), allowed)
    check_close("gradient", gradient, expected, allowed)
