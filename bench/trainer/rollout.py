"""Guided generation of image tokens at Janus-Pro shapes: time per decoding step, and images/s.

The time of a step is that of the whole call, including prefill and graph capture, divided by the
number of tokens. Minimum bytes of a step: the weights of the decoder and the image head once, and
the average live keys and values, including the prompts', of conditional and unconditional rows.
Weights are random.

With `cot` 128, prompts are longer by that many tokens and all differ, as after a chain of thought;
without, they come in groups of 8 equal ones. Peers run at two sizes only, once after a warm-up of
a few tokens, since they take minutes at the others. At these sizes ours is also measured with fp8
keys and values and with fp8 projection weights; these sample from different distributions, whose
entropy is compared.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from bench.harness import peers
from bench.harness.case import Absent, WrongResult, check_close
from bench.harness.measure import Bench
from bench.harness.rows import Measured, Row, make_row
from bench.trainer.models import (
    BOS,
    IMAGE_START,
    PAD,
    NumberTokenizer,
    in_transformers,
    make_model,
    model_configs,
)
from bench.trainer.t2i_r1 import generate_image
from iris_fast.config import SamplingConfig
from iris_fast.models.janus import Janus
from iris_fast.models.templates import unconditional_ids
from iris_fast.records import Trace
from iris_fast.rollout.sampler import Sampler

SUITE = "rollout"
PROMPT_TOKENS, COT_TOKENS, GROUP = 64, 128, 8
CFG_WEIGHT = 5.0
CHECKED_TOKENS = 3
RUNS = 3
PROFILED, PROFILED_TOKENS = ("eager loop", "transformers static"), 16
FP8_SETTINGS = {
    "ours, fp8 cache": {"kv_cache_dtype": "fp8"},
    "ours, fp8 weights": {"rollout_weight_dtype": "fp8"},
    "ours, fp8 cache and weights": {"kv_cache_dtype": "fp8", "rollout_weight_dtype": "fp8"},
}
ENTROPY_TOLERANCE = 0.02  # relative, in the norm over the first tokens

GPU_SEQUENCES, GPU_COMPARED = (2, 16, 64, 128, 256), (16, 64)
CPU_SEQUENCES, CPU_COMPARED = (2, 16), (16,)

# (prompt ids, tokens, greedy) -> codes [prompts, tokens]
GenerateCodes = Callable[[list[list[int]], int, bool], Tensor]


def rows(bench: Bench) -> Iterator[Row]:
    gpu = bench.device.type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    configs = model_configs(bench.device)
    for model in bench.models(configs):
        janus = make_model(configs[model], bench.device, dtype)
        for sequences in GPU_SEQUENCES if gpu else CPU_SEQUENCES:
            for cot in (0, COT_TOKENS):
                if not bench.wants(case_name(model, sequences, cot)):
                    continue
                compared = not cot and sequences in (GPU_COMPARED if gpu else CPU_COMPARED)
                yield from measure(bench, janus, model, sequences, cot, compared)
        del janus
        bench.release()


def profiles(bench: Bench) -> None:
    """Our calls at the sizes of the comparison, and the first tokens of two peers."""
    gpu = bench.device.type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    configs = model_configs(bench.device)
    for model in bench.models(configs):
        janus, config = make_model(configs[model], bench.device, dtype), configs[model]
        for sequences in GPU_COMPARED if gpu else CPU_COMPARED:
            if not bench.wants(case_name(model, sequences, 0)):
                continue
            prompts, what = make_prompts(sequences, 0), f"{model} sequences={sequences} cot=0"
            call = partial(ours(janus), prompts, config.image_tokens, False)
            bench.profile(f"{SUITE}/{what}", call)
            tokens = min(PROFILED_TOKENS, config.image_tokens)
            for name in PROFILED[: 1 if peers.generate_is_broken() else None]:
                call = partial(PEERS[name](janus), prompts, tokens, False)
                bench.profile(f"{SUITE}/{name}, {tokens} tokens, {what}", call)
        call = None
        del janus
        bench.release()


def case_name(model: str, sequences: int, cot: int) -> str:
    """What --case looks in."""
    return f"image tokens {model} sequences={sequences} cot={cot}"


def make_prompts(sequences: int, cot: int) -> list[list[int]]:
    """Prompt ids (BOS, words, image start) for the conditional half of `sequences`."""
    generator = torch.Generator().manual_seed(sequences)
    length = PROMPT_TOKENS + cot
    group = 1 if cot else GROUP
    different = torch.randint(10, 400, (sequences // 2, length), generator=generator)
    first_of_group = torch.arange(sequences // 2) // group * group
    prompts = different[first_of_group]
    prompts[:, 0], prompts[:, -1] = BOS, IMAGE_START
    return prompts.tolist()


def measure(
    bench: Bench, janus: Janus, model: str, sequences: int, cot: int, compared: bool
) -> Iterator[Row]:
    """One row for the time of a step and one for the images per second."""
    prompts, tokens = make_prompts(sequences, cot), janus.config.image_tokens
    dtype = janus.lm_head.weight.dtype
    expected = ours(janus)(prompts, CHECKED_TOKENS, True)

    def measure_one(name: str) -> Measured:
        if name == "ours":
            return timed(bench, ours(janus), prompts, tokens, RUNS)
        if name in FP8_SETTINGS:
            check_entropy(name, janus, prompts)
            return timed(bench, ours(janus, **FP8_SETTINGS[name]), prompts, tokens, RUNS)
        generate = PEERS[name](janus)
        check(name, generate(prompts, CHECKED_TOKENS, True), expected, dtype)
        return timed(bench, generate, prompts, tokens, 1)

    names = ["ours", *((*FP8_SETTINGS, *PEERS) if compared else ())]
    found = bench.compare(
        f"rollout {model} {sequences}", {name: partial(measure_one, name) for name in names}
    )
    mine = found.pop("ours")
    floor = step_bytes(janus, sequences, PROMPT_TOKENS + cot) / bench.copy_bytes_per_second
    shape = {"model": model, "sequences": sequences, "cot": cot, "tokens": tokens}
    images = sequences / 2 / tokens  # divided by the seconds of a step: images per second
    for metric, unit, convert in (
        ("step", "ms", lambda measured: measured.times(1e3)),
        ("images", "images/s", lambda measured: measured.inverse(images)),
    ):
        best = convert(Measured(floor)).value
        yield make_row(
            SUITE, "image tokens", shape, dtype, metric, unit, convert(mine), floor=best,
            copy_floor=best, peers={name: convert(peer) for name, peer in found.items()},
        )  # fmt: skip


def step_bytes(janus: Janus, sequences: int, prompt: int) -> float:
    """Bytes that one step must read, averaged over the image."""
    config, weight = janus.config.decoder, janus.lm_head.weight
    read = [janus.model.language_model.layers, janus.model.generation_head]
    weights = sum(p.numel() for module in read for p in module.parameters())
    slot = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    live = sequences * (prompt + janus.config.image_tokens / 2)
    return (weights + slot * live) * weight.element_size()


def timed(
    bench: Bench, generate: GenerateCodes, prompts: list[list[int]], tokens: int, runs: int
) -> Measured:
    """Seconds per step (median of `runs`, after a warm-up), and on a GPU the peak bytes added."""
    gpu = bench.device.type == "cuda"
    generate(prompts, min(tokens, 8), False)
    before = 0
    if gpu:
        bench.release()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    seconds = []
    for _ in range(runs):
        if gpu:
            torch.cuda.synchronize()
        started = time.perf_counter()
        generate(prompts, tokens, False)
        if gpu:
            torch.cuda.synchronize()
        seconds.append((time.perf_counter() - started) / tokens)
    peak = torch.cuda.max_memory_allocated() - before if gpu else None
    return Measured(statistics.median(seconds), peak)


def check(name: str, codes: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Raise WrongResult unless greedy codes agree: in float32 all of them; in bfloat16, where ties
    may be resolved differently, at least half of the first ones."""
    same = (codes.cpu() == expected.cpu()).float()
    right = same.all() if dtype == torch.float32 else same[:, 0].mean() >= 0.5
    if not right:
        raise WrongResult(f"{name} generates other greedy tokens: {same.mean():.0%} agree")


def check_entropy(name: str, janus: Janus, prompts: list[list[int]]) -> None:
    """Raise WrongResult unless the first tokens' entropy with fp8 is close to that without."""
    exact, fp8 = (
        trace.conditional.entropy[:, 0]
        for _, trace in (
            generate_codes(janus, prompts, 1, True, settings)
            for settings in ({"rollout_engine": "static"}, FP8_SETTINGS[name])
        )
    )
    check_close(f"entropy, {name}", fp8, exact, ENTROPY_TOLERANCE)


# --- Ours and the peers ---------------------------------------------------------------------------


def ours(janus: Janus, **settings: str) -> GenerateCodes:
    """The image phase of the trainer's rollout, with its defaults or the given settings."""
    return lambda prompts, tokens, greedy: generate_codes(janus, prompts, tokens, greedy, settings)[
        0
    ]


@torch.no_grad()
def generate_codes(
    janus: Janus, prompts: list[list[int]], tokens: int, greedy: bool, settings: dict[str, str]
) -> tuple[Tensor, Trace]:
    """Codes [prompts, tokens] and their statistics."""
    if settings:
        settings = {"rollout_engine": "static"} | settings
    tokenizer = NumberTokenizer(janus.config.decoder.vocab_size)
    config = SamplingConfig(cfg_weight=CFG_WEIGHT, **settings)
    sampler = Sampler(janus, tokenizer, config, tokens, greedy)
    unconditional = [unconditional_ids(ids, tokenizer) for ids in prompts]
    return sampler.sample_image(prompts, unconditional, list(range(len(prompts))), lambda: None)


def eager_loop(janus: Janus) -> GenerateCodes:
    """The loop of T2I-R1 and of Janus's example: transformers' decoder, one step at a time, with a
    growing cache, softmax and multinomial."""
    model = in_transformers(janus)

    def generate(prompts: list[list[int]], tokens: int, greedy: bool) -> Tensor:
        ids = torch.tensor(prompts, device=janus.lm_head.weight.device)
        return generate_image(model, ids, tokens, CFG_WEIGHT, greedy)

    return generate


def transformers_generate(janus: Janus, compiled: bool = False) -> GenerateCodes:
    """transformers' `generate` with its static cache, and with its decoder compiled or not."""
    if peers.generate_is_broken():
        raise Absent(f"{peers.GENERATE} does not work; 5.18 does")
    model = in_transformers(janus)
    if compiled:
        model.model.language_model.forward = torch.compile(
            model.model.language_model.forward, mode="reduce-overhead"
        )

    @torch.no_grad()
    def generate(prompts: list[list[int]], tokens: int, greedy: bool) -> Tensor:
        ids = torch.tensor(prompts, device=janus.lm_head.weight.device)
        model.model.vision_model.config.num_image_tokens = tokens
        config = model.generation_config
        config.bos_token_id, config.pad_token_id = BOS, PAD
        config.guidance_scale = CFG_WEIGHT
        config.generation_kwargs = {"boi_token_id": IMAGE_START}
        return model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            generation_mode="image",
            do_sample=not greedy,
            cache_implementation="static",
            max_length=ids.shape[1] + tokens,
        )

    return generate


PEERS: dict[str, Callable[[Janus], GenerateCodes]] = {
    "eager loop": eager_loop,
    "transformers static": transformers_generate,
    "transformers compiled": partial(transformers_generate, compiled=True),
}
