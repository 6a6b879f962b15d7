"""The GPU's code on fake CUDA tensors: devices, dtypes, waits, captured steps, peak memory.

Models have true sizes unless a test says otherwise; `bench.harness.fake_cuda` replaces the device.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator

import pytest
import torch
from iris_kernels import TokenStats, add_rms_norm, guided_sample
from small_runs import quick

from bench.harness.fake_cuda import FakeCuda, fake_cuda
from bench.trainer.models import NumberTokenizer, make_model, model_configs
from iris_fast import distributed
from iris_fast.config import PRESETS, TrainConfig
from iris_fast.distributed import Ranks
from iris_fast.grpo.optimizer import make_optimizer
from iris_fast.grpo.policy import build_models
from iris_fast.grpo.update import Learner
from iris_fast.models.images import decode_images
from iris_fast.models.janus import Janus, JanusConfig
from iris_fast.models.pretrained.load import LoadedJanus
from iris_fast.models.templates import TEMPLATES, image_prompt_ids
from iris_fast.models.vq import VQConfig, VQModel
from iris_fast.preflight.estimate import H200, estimate
from iris_fast.preflight.inputs import Inputs, open_inputs
from iris_fast.records import Prompt, Rollout, Scored, Trace
from iris_fast.rollout.sampler import Sampler
from iris_fast.run import checkpoint
from iris_fast.run.checkpoint import Progress

CUDA = torch.device("cuda")
SIZES = model_configs(CUDA)
WORDS = 64
COT = 128
CLOSE = 0.10  # relative, between the estimated and the counted peak


@contextlib.contextmanager
def quiet(custom_ops: bool = True) -> Iterator[FakeCuda]:
    with warnings.catch_warnings(), fake_cuda(custom_ops) as device:
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
        yield device


@pytest.fixture
def gpu() -> Iterator[FakeCuda]:
    with quiet() as device:
        yield device


@pytest.fixture
def gpu_ranks(gpu: FakeCuda) -> Iterator[Ranks]:
    with distributed.start("cuda", 60.0) as started:
        yield started


def settings(model: str, **changes) -> TrainConfig:
    preset = PRESETS[f"janus-pro-{model.lower()}"]
    fixed = {"prompts": "p.txt", "max_completion_length": COT}
    return TrainConfig(**preset | fixed | changes)


def shallow(model: str) -> JanusConfig:
    """The true widths, and one layer."""
    config = SIZES[model]
    return dataclasses.replace(config, decoder=dataclasses.replace(config.decoder, num_layers=1))


def prompts_of(config: TrainConfig, count: int) -> list[Prompt]:
    """`count` samples in groups, whose prompts differ between groups."""
    group = config.num_generations
    texts = [" ".join(str(10 + i // group) for _ in range(WORDS)) for i in range(count)]
    return [Prompt(text) for text in texts]


def make_sampler(model: JanusConfig, config: TrainConfig) -> Sampler:
    janus = make_model(model, CUDA, torch.bfloat16)
    janus.attn_implementation = "varlen"
    tokens = config.image_token_num_per_image or model.image_tokens
    return Sampler(janus, NumberTokenizer(model.decoder.vocab_size), config, tokens)


def prompt_tokens(config: TrainConfig) -> int:
    tokenizer = NumberTokenizer(102400)
    template = TEMPLATES[config.template]
    return len(image_prompt_ids(tokenizer, template, prompts_of(config, 1)[0].text))


# --- The device itself ----------------------------------------------------------------------------


def test_a_captured_step_may_neither_wait_nor_copy(gpu):
    x = torch.ones(4, 4, device=CUDA)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x.mul_(2.0)
    assert [launch.name for launch in gpu.captured[0]] == ["aten.mul_.Tensor"]
    for forbidden in (
        lambda: x.sum().item(),
        lambda: x.cpu(),
        lambda: x.tolist(),
        lambda: x.add_(torch.ones(4)[:, None].to(CUDA)),
        lambda: torch.tensor([1, 2], device=CUDA),
        torch.cuda.synchronize,
    ):
        message = "not permitted when stream is capturing"
        with pytest.raises(RuntimeError, match=message), torch.cuda.graph(graph):
            forbidden()


def test_devices_and_dtypes_are_checked(gpu):
    x = torch.ones(4, 4, device=CUDA)
    with pytest.raises(RuntimeError, match="device"):
        x + torch.ones(4, 4)
    with pytest.raises(RuntimeError, match="dtype"):
        x @ x.bfloat16()
    with pytest.raises(ValueError, match="uniform is on cpu"):
        guided_sample(x, x, torch.rand(4), cfg_weight=5.0)


def test_memory_is_counted_until_it_is_freed(gpu):
    x = torch.empty(1024, 1024, device=CUDA)
    y = x.t() @ x
    assert gpu.live_bytes == 2 * 4 * 2**20
    del y
    assert gpu.live_bytes == 4 * 2**20
    assert gpu.peak_bytes == 8 * 2**20


def test_gradients_flow_between_nodes(gpu):
    x = torch.ones(4, 8, device=CUDA, requires_grad=True)
    weight = torch.ones(8, 8, device=CUDA, requires_grad=True)
    (torch.nn.functional.silu(x @ weight) * x).sum().backward()
    assert x.grad.device == weight.grad.device == torch.device("cuda", 0)


def test_a_triton_launch_is_recorded_with_its_operands(gpu):
    x, weight = (torch.ones(shape, device=CUDA, dtype=torch.bfloat16) for shape in ((4, 64), 64))
    add_rms_norm(x, weight, eps=1e-6, delta=x.clone())
    launch = gpu.launches[-1]
    assert launch.triton and launch.grid[0] == 4
    assert launch.bytes == 3 * x.nbytes + weight.nbytes


# --- Rollout --------------------------------------------------------------------------------------

STATIC = {"rollout_engine": "static"}
ROLLOUTS = {
    "1B": ("1B", {}),
    "7B": ("7B", {}),
    "1B, fp8": ("1B", STATIC | {"kv_cache_dtype": "fp8", "rollout_weight_dtype": "fp8"}),
}


@pytest.mark.parametrize("name", ROLLOUTS)
def test_peak_memory_of_a_rollout_is_the_estimate(gpu, name):
    size, changes = ROLLOUTS[name]
    config = settings(size, **changes)
    sampler = make_sampler(SIZES[size], config)
    samples = prompts_of(config, config.prompts_per_step * config.num_generations)
    rollout = sampler.rollout(samples, list(range(len(samples))))
    assert rollout.codes_NI.shape == (64, 576)
    assert len(gpu.captured) == 2  # text and image
    needs = estimate(config, SIZES[size], 1, H200, prompt_tokens(config))
    expected = needs.always_bytes["sampler's copy"] + sum(needs.rollout_bytes.values())
    assert gpu.peak_bytes == pytest.approx(expected, rel=CLOSE)


VARIANTS = {
    "plain": {
        "rollout_engine": "plain", "max_completion_length": 4, "image_token_num_per_image": 4,
    },
    "static": {},
    "fp8 cache": STATIC | {"kv_cache_dtype": "fp8"},
    "fp8 weights": STATIC | {"rollout_weight_dtype": "fp8"},
    "top_k": {"top_k": 50},
    "top_p": {"top_p": 0.9},
    "min_p": {"min_p": 0.1},
    "all": {"top_k": 50, "top_p": 0.9, "min_p": 0.1},
    "no guidance": {"cfg_weight": 1.0},
}  # fmt: skip


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", VARIANTS)
def test_a_step_is_captured_without_waits_or_copies(gpu, size, name):
    """The capture itself raises RuntimeError for either."""
    fixed = {"max_completion_length": 16, "image_token_num_per_image": 16}
    config = settings(size, **fixed | VARIANTS[name])
    model = shallow(size)
    sampler = make_sampler(model, config)
    samples = prompts_of(config, 8)
    before = len(gpu.waits)
    rollout = sampler.rollout(samples, list(range(len(samples))))
    assert rollout.image.guided.logprob.shape == (8, config.image_token_num_per_image)
    static = name != "plain"
    assert sampler.uses_cuda_graph == static
    assert [bool(step) for step in gpu.captured] == [True, True] * static
    if static:
        kernels = {launch.name for launch in gpu.captured[1] if launch.triton}
        assert {"_sample_kernel", "_decode_kernel"} <= kernels
        # Once per rollout phase tokens and statistics are read, and text's end is looked for.
        assert len(gpu.waits) - before <= 6


def test_a_kept_graph_is_replayed_from_the_first_token(gpu):
    """The second rollout captures nothing, and the step's memory stays where it was."""
    config = settings("1B", max_completion_length=16, image_token_num_per_image=16)
    sampler = dataclasses.replace(make_sampler(shallow("1B"), config), keep_memory=True)
    samples = prompts_of(config, 8)
    for _ in range(2):
        sampler.rollout(samples, list(range(8)))
        assert len(gpu.captured) == 2  # text and image


# --- Training -------------------------------------------------------------------------------------


def load(gpu: FakeCuda, model: JanusConfig) -> Inputs:
    """A model of these sizes, as if opened on the CPU."""
    with gpu.fake_host():
        janus, vq = Janus(model), VQModel(model.vq)
    vq.requires_grad_(False)
    tokenizer = NumberTokenizer(model.decoder.vocab_size)
    return Inputs(LoadedJanus(janus, vq, tokenizer, model, {}), [], model.image_tokens)


def sampled(config: TrainConfig, model: JanusConfig) -> Scored:
    """What a rollout of one micro-batch gives, with chains of thought of the maximum length."""
    count = config.per_device_train_batch_size * config.num_generations
    prompt, cot = [10] * prompt_tokens(config), [7] * config.max_completion_length
    tokenizer = NumberTokenizer(model.decoder.vocab_size)

    def trace(width: int) -> Trace:
        fields = [torch.zeros(count, width) for _ in range(4)]
        return Trace(TokenStats(*fields), TokenStats(*fields), torch.ones(count, width) > 0)

    rollout = Rollout(
        prompts=prompts_of(config, count),
        sample_numbers=list(range(count)),
        seed=0,
        cot_prompt_ids=[prompt] * count,
        cot_ids=[cot] * count,
        cot_texts=[""] * count,
        truncated=[True] * count,
        image_prompt_ids=[prompt + cot] * count,
        unconditional_prompt_ids=[[tokenizer.bos_id] * (len(prompt) + len(cot))] * count,
        codes_NI=torch.zeros(count, model.image_tokens, dtype=torch.int64),
        text=trace(len(cot)),
        image=trace(model.image_tokens),
    )
    zeros = torch.zeros(count)
    return Scored(rollout, {}, zeros, zeros)


def build(
    gpu: FakeCuda, ranks: Ranks, config: TrainConfig, model: JanusConfig
) -> tuple[Learner, Janus]:
    with gpu.fake_host():
        models = build_models(load(gpu, model), config, ranks)
    optimizer = make_optimizer(models.policy, config)
    learner = Learner(models.policy, models.reference, optimizer, config, ranks)
    learner.copy_weights_to(models.sampler.janus)
    return learner, models.sampler.janus


def test_peak_memory_of_a_training_pass_with_recomputation_is_the_estimate():
    """Without moments, which `test_estimate` counts: on a GPU their step is compiled."""
    size = "7B"
    config = settings(size, gradient_accumulation_steps=1)
    assert config.gradient_checkpointing
    with quiet(custom_ops=False) as gpu, distributed.start("cuda", 60.0) as ranks:
        learner, copy = build(gpu, ranks, config, SIZES[size])
        gpu.reset_peak()
        batches = learner.prepare(sampled(config, SIZES[size]), None)
        learner._accumulate(batches, lambda: None)
        del learner, copy, batches
    needs = estimate(config, SIZES[size], 1, H200, prompt_tokens(config))
    states = sum(needs.always_bytes.values()) - needs.always_bytes[f"moments, {config.optim}"]
    expected = states + sum(needs.training_bytes.values())
    assert gpu.peak_bytes == pytest.approx(expected, rel=CLOSE), needs.table()


SMALL = {
    "gradient_accumulation_steps": 1,
    "per_device_train_batch_size": 1,
    "num_generations": 2,
    "max_completion_length": 8,
}


def test_peak_memory_of_a_whole_step_is_the_estimate():
    """A second step, with moments, and with the caches of the rollout beside the training pass."""
    config = settings("1B", gradient_accumulation_steps=1)
    needs = estimate(config, SIZES["1B"], 1, H200, prompt_tokens(config))
    assert needs.caches_fit_during_training
    with quiet(custom_ops=False) as gpu, distributed.start("cuda", 60.0) as ranks:
        with gpu.fake_host():
            models = build_models(load(gpu, SIZES["1B"]), config, ranks, True)
        optimizer = make_optimizer(models.policy, config)
        learner = Learner(models.policy, models.reference, optimizer, config, ranks)
        for parameter in (p for p in models.policy.parameters() if p.requires_grad):
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        learner.discard_gradients()
        gpu.reset_peak()
        samples = prompts_of(config, config.prompts_per_step * config.num_generations)
        rollout = models.sampler.rollout(samples, list(range(len(samples))))
        zeros = torch.zeros(len(samples))
        learner.update(learner.prepare(Scored(rollout, {}, zeros, zeros), None), 1)
        learner.copy_weights_to(models.sampler.janus)
        del learner, models, optimizer, parameter
    parts = (needs.always_bytes, needs.rollout_bytes, needs.training_bytes)
    expected = sum(sum(part.values()) for part in parts)
    assert gpu.peak_bytes == pytest.approx(expected, rel=CLOSE), needs.table()


STEPS = {
    "1B": ("1B", {}),
    "7B": ("7B", {}),
    "guided policy": ("1B", {"policy_distribution": "guided"}),
    "recomputation": ("1B", {"gradient_checkpointing": True}),
    "direct": ("1B", {"objective": "direct", "reward_funcs": ["image_nsc"]}),
    "adapters": ("1B", {"use_peft": True}),
    "offloaded reference": ("1B", {"offload_reference": True}),
    "image head": ("1B", {"train_image_head": True}),
    "bf16 moments": ("1B", {"optim": "adamw_torch_bf16"}),
}


@pytest.mark.parametrize("name", STEPS)
def test_an_optimizer_step_runs(name):
    """One layer of the true width. Every wait of a micro-batch stalls the GPU: they are few."""
    size, changes = STEPS[name]
    config, model = settings(size, **SMALL | changes), shallow(size)
    down_to_launches = name in ("1B", "image head")  # the others call the same ops
    with quiet(down_to_launches) as gpu, distributed.start("cuda", 60.0) as ranks:
        learner, copy = build(gpu, ranks, config, model)
        assert learner.policy.attn_implementation == "varlen"
        batches = learner.prepare(sampled(config, model), None)
        gpu.waits.clear()
        found = learner.update(batches, 0)
        assert found["micro_batch_pieces"] == 1
        assert len(gpu.waits) <= 12
        learner.copy_weights_to(copy)
        del learner, copy, batches
    kernels = {launch.name for launch in gpu.launches if launch.triton}
    assert bool(kernels) == down_to_launches


# --- Images, checkpoints --------------------------------------------------------------------------


def test_images_are_decoded(gpu):
    with gpu.fake_host():
        vq = VQModel(VQConfig()).requires_grad_(False)
    vq.to(CUDA)
    images = decode_images(vq, torch.zeros(2, 576, dtype=torch.int64))
    assert [image.size for image in images] == [(384, 384)] * 2
    assert len(gpu.waits) == 2  # one copy of the pixels per image


def test_a_checkpoint_is_saved_and_opened(gpu, gpu_ranks, tmp_path):
    """The tiny model, whose files are small."""
    config = quick(tmp_path, device="cuda")
    inputs = open_inputs(config, torch.float32)
    gpu.without_values(inputs.loaded.model)
    gpu.without_values(inputs.loaded.vq)
    with gpu.fake_host():
        models = build_models(inputs, config, gpu_ranks)
    learner = Learner(
        models.policy, models.reference, make_optimizer(models.policy, config), config, gpu_ranks
    )
    scored = sampled(config, inputs.loaded.config)
    learner.update(learner.prepare(scored, None), 0)
    progress = Progress(step=1)
    path = checkpoint.save(tmp_path, models.policy, learner.optimizer, progress, gpu_ranks, keep=1)
    assert checkpoint.newest(tmp_path) == (path, [])
    found = checkpoint.load(path, models.policy, learner.optimizer, gpu_ranks)
    assert found.step == 1
