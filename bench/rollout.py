"""Image tokens of Janus-Pro shapes with guidance: one decoding step, prompts and all.

A step's time is that of the whole call, prefill and graph capture included, over its tokens. Least
bytes of a step: the decoder's and the image head's weights once, and the keys and values that are
live on average, prompts too, of conditional and unconditional rows. Weights are random.

With `cot` 128, prompts are that much longer and no two are equal, as after a chain of thought;
without, they come in groups of 8 equal ones. Peers run at two sizes only, once after a warm-up of
a few tokens: they take minutes at the others. There ours is also measured with keys and values, and
the projections' weights, in 8 bits: they draw from other distributions, whose entropy is compared.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from bench import _models, _peers
from bench._case import Absent, WrongResult, check_close
from bench._measure import Bench
from bench._models import BOS, IMAGE_START, PAD, Numbers
from bench._rows import Measured, Row, make_row
from bench._t2i_r1 import draw_image
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
EIGHT_BITS = {
    "ours, fp8 cache": {"kv_cache_dtype": "fp8"},
    "ours, fp8 weights": {"rollout_weight_dtype": "fp8"},
    "ours, fp8 cache and weights": {"kv_cache_dtype": "fp8", "rollout_weight_dtype": "fp8"},
}
ENTROPY_SLACK = 0.02  # relative, in the norm over the first tokens

GPU_SEQUENCES, GPU_COMPARED = (2, 16, 64, 128, 256), (16, 64)
CPU_SEQUENCES, CPU_COMPARED = (2, 16), (16,)

# draw(prompt ids, tokens, greedy) -> codes [prompts, tokens]
Draw = Callable[[list[list[int]], int, bool], Tensor]


def rows(bench: Bench) -> Iterator[Row]:
    gpu = bench.device.type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    for model, config in _models.sizes(bench.device).items():
        janus = _models.make_model(config, bench.device, dtype)
        for sequences in GPU_SEQUENCES if gpu else CPU_SEQUENCES:
            for cot in (0, COT_TOKENS):
                compared = not cot and sequences in (GPU_COMPARED if gpu else CPU_COMPARED)
                yield from measure(bench, janus, model, sequences, cot, compared)
        del janus
        bench.release()


def profiles(bench: Bench) -> None:
    """Our calls where they are compared with others', and the first tokens of two others'."""
    gpu = bench.device.type == "cuda"
    dtype = torch.bfloat16 if gpu else torch.float32
    for model, config in _models.sizes(bench.device).items():
        janus = _models.make_model(config, bench.device, dtype)
        for sequences in GPU_COMPARED if gpu else CPU_COMPARED:
            prompts, what = make_prompts(sequences, 0), f"{model} sequences={sequences} cot=0"
            draw = ours(janus)
            call = partial(draw, prompts, config.image_tokens, False)
            bench.profile(f"{SUITE}/{what}", call)
            tokens = min(PROFILED_TOKENS, config.image_tokens)
            for name in PROFILED[: 1 if _peers.generate_is_broken() else None]:
                call = partial(PEERS[name](janus), prompts, tokens, False)
                bench.profile(f"{SUITE}/{name}, {tokens} tokens, {what}", call)
        del janus, draw, call
        bench.release()


def make_prompts(sequences: int, cot: int) -> list[list[int]]:
    """Ids of BOS, words, image-start. Half of `sequences` are these, half unconditional."""
    generator = torch.Generator().manual_seed(sequences)
    length = PROMPT_TOKENS + cot
    group = 1 if cot else GROUP
    drawn = torch.randint(10, 400, (sequences // 2, length), generator=generator)
    first = torch.arange(sequences // 2) // group * group
    prompts = drawn[first]
    prompts[:, 0], prompts[:, -1] = BOS, IMAGE_START
    return prompts.tolist()


def measure(
    bench: Bench, janus: Janus, model: str, sequences: int, cot: int, compared: bool
) -> Iterator[Row]:
    """A row for the step's time and one for the images a second."""
    prompts, tokens = make_prompts(sequences, cot), janus.config.image_tokens
    dtype = janus.lm_head.weight.dtype
    expected = ours(janus)(prompts, CHECKED_TOKENS, True)

    def measure_one(name: str) -> Measured:
        if name == "ours":
            return timed(bench, ours(janus), prompts, tokens, RUNS)
        if name in EIGHT_BITS:
            check_entropy(name, janus, prompts)
            return timed(bench, ours(janus, **EIGHT_BITS[name]), prompts, tokens, RUNS)
        draw = PEERS[name](janus)
        check(name, draw(prompts, CHECKED_TOKENS, True), expected, dtype)
        return timed(bench, draw, prompts, tokens, 1)

    names = ["ours", *((*EIGHT_BITS, *PEERS) if compared else ())]
    peers = bench.compare(
        f"rollout {model} {sequences}", {name: partial(measure_one, name) for name in names}
    )
    mine = peers.pop("ours")
    floor = step_bytes(janus, sequences, PROMPT_TOKENS + cot) / bench.copy_bytes_per_second
    shape = {"model": model, "sequences": sequences, "cot": cot, "tokens": tokens}
    images = sequences / 2 / tokens  # over the seconds of a token: images a second
    for metric, unit, convert in (
        ("step", "ms", lambda measured: measured.times(1e3)),
        ("images", "images/s", lambda measured: measured.inverse(images)),
    ):
        best = convert(Measured(floor)).value
        yield make_row(
            SUITE, "image tokens", shape, dtype, metric, unit, convert(mine), floor=best,
            copy_floor=best, peers={name: convert(peer) for name, peer in peers.items()},
        )  # fmt: skip


def step_bytes(janus: Janus, sequences: int, prompt: int) -> float:
    """Bytes that one step must read, on average over the image."""
    config, weight = janus.config.decoder, janus.lm_head.weight
    read = [janus.model.language_model.layers, janus.model.generation_head]
    weights = sum(p.numel() for module in read for p in module.parameters())
    slot = 2 * config.num_layers * config.num_kv_heads * config.head_dim
    live = sequences * (prompt + janus.config.image_tokens / 2)
    return (weights + slot * live) * weight.element_size()


def timed(bench: Bench, draw: Draw, prompts: list[list[int]], tokens: int, runs: int) -> Measured:
    """Seconds a token (median of `runs`, after a warm-up), and on a GPU the peak bytes added."""
    gpu = bench.device.type == "cuda"
    draw(prompts, min(tokens, 8), False)
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
        draw(prompts, tokens, False)
        if gpu:
            torch.cuda.synchronize()
        seconds.append((time.perf_counter() - started) / tokens)
    peak = torch.cuda.max_memory_allocated() - before if gpu else None
    return Measured(statistics.median(seconds), peak)


def check(name: str, codes: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Greedy codes: all equal in float32; in bfloat16 most first ones, as ties fall either way."""
    same = (codes.cpu() == expected.cpu()).float()
    right = same.all() if dtype == torch.float32 else same[:, 0].mean() >= 0.5
    if not right:
        raise WrongResult(f"{name} drew other greedy tokens: {same.mean():.0%} agree")


def check_entropy(name: str, janus: Janus, prompts: list[list[int]]) -> None:
    """The first tokens' entropy in 8 bits is near that of our other ways; WrongResult otherwise."""
    exact, eight = (
        trace.conditional.entropy[:, 0]
        for _, trace in (
            draw_image_tokens(janus, prompts, 1, True, settings)
            for settings in ({"rollout_engine": "static"}, EIGHT_BITS[name])
        )
    )
    check_close(f"entropy, {name}", eight, exact, ENTROPY_SLACK)


# --- Ours and the peers ---------------------------------------------------------------------------


def ours(janus: Janus, **settings: str) -> Draw:
    """The trainer's rollout, image phase, with other settings than its own if they are given."""
    return lambda prompts, tokens, greedy: draw_image_tokens(
        janus, prompts, tokens, greedy, settings
    )[0]


@torch.no_grad()
def draw_image_tokens(
    janus: Janus, prompts: list[list[int]], tokens: int, greedy: bool, settings: dict[str, str]
) -> tuple[Tensor, Trace]:
    """Codes [prompts, tokens] and their statistics."""
    if settings:
        settings = {"rollout_engine": "static"} | settings
    tokenizer = Numbers(janus.config.decoder.vocab_size)
    config = SamplingConfig(cfg_weight=CFG_WEIGHT, **settings)
    sampler = Sampler(janus, tokenizer, config, tokens, greedy)
    unconditional = [unconditional_ids(ids, tokenizer) for ids in prompts]
    return sampler._draw_codes(prompts, unconditional, list(range(len(prompts))), lambda: None)


def eager_loop(janus: Janus) -> Draw:
    """The loop of T2I-R1 and of Janus's own example: transformers' decoder, a cache that grows,
    softmax and multinomial, a step at a time."""
    model = _models.in_transformers(janus)

    def draw(prompts: list[list[int]], tokens: int, greedy: bool) -> Tensor:
        ids = torch.tensor(prompts, device=janus.lm_head.weight.device)
        return draw_image(model, ids, tokens, CFG_WEIGHT, greedy)

    return draw


def generate(janus: Janus, compiled: bool = False) -> Draw:
    """transformers' `generate` with its static cache; `compiled`, its decoder compiled."""
    if _peers.generate_is_broken():
        raise Absent(f"{_peers.GENERATE} does not work")
    model = _models.in_transformers(janus)
    if compiled:
        model.model.language_model.forward = torch.compile(
            model.model.language_model.forward, mode="reduce-overhead"
        )

    @torch.no_grad()
    def draw(prompts: list[list[int]], tokens: int, greedy: bool) -> Tensor:
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

    return draw


PEERS: dict[str, Callable[[Janus], Draw]] = {
    "eager loop": eager_loop,
    "transformers static": generate,
    "transformers compiled": lambda janus: generate(janus, compiled=True),
}
