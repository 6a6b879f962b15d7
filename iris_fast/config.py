"""Every setting, once, with its default and its help. Imports neither torch nor the rest.

Field names are TRL's `GRPOConfig` wherever the meaning is the same, Janus's for guidance.
Precedence: these defaults < `--preset` < `--config file.yaml` < flags.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml

from iris_fast.errors import UserError, require
from iris_fast.rewards.table import DIFFERENTIABLE, REWARDS

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
EIGHT_BITS = ("kv_cache_dtype", "rollout_weight_dtype")  # settings that may be fp8


@dataclass(kw_only=True)
class SamplingConfig:
    """How prompts become images; shared by training and `iris_fast.generate`."""

    model: str = "tiny"
    """Folder of a Janus checkpoint (original or transformers layout), a hub id such as
    deepseek-ai/Janus-Pro-1B, or `tiny` for the small trained model of the package."""
    prompts: str | None = None
    """Prompt file: .txt (one a line), .jsonl (field `prompt`, other fields go to the rewards), or a
    Hugging Face datasets path. With --model tiny the default is the package's own file."""
    template: Literal["janus-pro", "janus-1.3b", "t2i-r1"] = "janus-pro"
    """Chat template: which role strings surround a prompt."""
    cot: bool = False
    """Let the model first write a semantic chain of thought, then draw `PROMPT. COT`."""
    cot_instruction: str | None = None
    """Text file with the chain-of-thought instruction, holding the placeholder {prompt}."""
    max_prompt_length: int = 512
    """Longest prompt accepted, in tokens."""
    max_completion_length: int = 256
    """Longest chain of thought, in tokens; a longer one is cut there."""
    image_token_num_per_image: int | None = None
    """Tokens per image, a square number; default: what the checkpoint's image size gives."""
    cfg_weight: float = 5.0
    """Classifier-free guidance: logits = uncond + cfg_weight * (cond - uncond)."""
    temperature: float = 1.0
    """Sampling temperature of text and image tokens. Log-probs that are trained on, and the
    `conditional` statistics, stay at temperature 1."""
    top_k: int = 0
    """Sample among the k most likely tokens; 0: all."""
    top_p: float = 1.0
    """Sample among the most likely tokens that together hold this probability; 1: all."""
    min_p: float = 0.0
    """Drop tokens less likely than min_p times the most likely one; 0: none."""
    rollout_engine: Literal["auto", "static", "plain"] = "auto"
    """How tokens are decoded: static shares the keys and values of equal prompts, reads live ones
    only, and on a GPU replays one CUDA graph a step; plain keeps a copy a sequence and uses torch's
    attention. auto: static on a GPU. The tokens are the same up to rounding."""
    attn_implementation: Literal["auto", "sdpa", "varlen", "flash_attention_2", "xformers"] = "auto"
    """Attention over whole sequences, in training passes and for prompts: sdpa is torch's, on
    padded copies, and works everywhere; without padding, on a GPU in half precision, varlen is
    torch's own and the others are the packages flash-attn and xformers. auto: flash_attention_2
    where it is installed, else varlen, else sdpa; what that came to is shown and logged."""
    seed: int = 42
    """Seed of everything random. The same seed gives the same images whatever the batch size or
    the number of ranks, to round-off of the logits."""
    kv_cache_dtype: Literal["auto", "fp8"] = "auto"
    """How keys and values are kept while drawing; fp8 (e4m3) takes half the memory and traffic of
    bfloat16, changes the tokens drawn, and needs --rollout_engine static."""
    rollout_weight_dtype: Literal["auto", "fp8"] = "auto"
    """How the decoder's projections are read while drawing; fp8 (e4m3, a scale a channel, and a
    scale a row for what they are applied to) takes half the traffic of bfloat16 and holds a second
    copy, changes the tokens drawn, and needs --rollout_engine static."""
    bf16: bool = False
    """Compute in bfloat16 (training keeps float32 master weights)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; auto: the GPU if there is one."""

    def __post_init__(self) -> None:
        """Check every range; raise UserError naming the setting, the value and the remedy."""
        for name in ("model", "prompts", "cot_instruction", "output_dir"):
            require(getattr(self, name, None) != "", name, "''", "give a value or leave it out")
        require_at_least(self, 1, "max_prompt_length", "max_completion_length")
        require_at_least(self, 0, "top_k", "temperature", "min_p")
        for name in EIGHT_BITS:
            if getattr(self, name) == "fp8" and self.rollout_engine != "static":
                raise UserError(f"{name}: fp8 needs the static engine; add --rollout_engine static")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "give a number in (0, 1]; 1 is off")
        require(self.min_p <= 1, "min_p", self.min_p, "give a number in [0, 1]; 0 is off")
        require(math.isfinite(self.cfg_weight), "cfg_weight", self.cfg_weight, "give a number")
        tokens = self.image_token_num_per_image
        if tokens is not None:
            square = tokens >= 4 and math.isqrt(tokens) ** 2 == tokens
            require(square, "image_token_num_per_image", tokens, "give a square from 4, say 576")
        if self.prompts is None and self.model != "tiny":
            raise UserError(
                f"prompts: --model {self.model} needs a prompt file; add --prompts FILE "
                "(.txt, one a line, or .jsonl with a field `prompt`)"
            )


@dataclass(kw_only=True)
class GenerateConfig(SamplingConfig):
    """Settings of `python -m iris_fast.generate`."""

    output_dir: str = "images"
    """Folder for the PNGs, PROMPT_IMAGE.png, both counted from 0. Existing ones are kept only if
    --overwrite is false and then stop the command."""
    num_images_per_prompt: int = 1
    """Images per prompt."""
    batch_size: int = 16
    """Images drawn at a time; changes speed and memory, and the images only where the logits'
    round-off decides between two tokens: hardly ever in float32, often in bfloat16."""
    greedy: bool = False
    """Take the most likely token instead of sampling."""
    save_codes: str | None = None
    """Also write the image tokens: an .npz file with `codes` [prompts, images, tokens]."""
    overwrite: bool = False
    """Replace images that exist."""

    def __post_init__(self) -> None:
        """Check every range."""
        super().__post_init__()
        require_at_least(self, 1, "num_images_per_prompt", "batch_size")
        if self.save_codes is not None:
            require(self.save_codes.endswith(".npz"), "save_codes", self.save_codes, "end in .npz")


@dataclass(kw_only=True)
class TrainConfig(SamplingConfig):
    """Settings of `torchrun -m iris_fast.train`."""

    preset: Literal["tiny", "janus-pro-1b", "janus-pro-7b"] = "tiny"
    """A named set of defaults: tiny (offline, CPU) or the paper's hyperparameters."""
    output_dir: str | None = None
    """Run folder; default: runs/PRESET-NNN, the next free number."""
    resume_from_checkpoint: bool = False
    """Go on from the newest complete checkpoint in --output_dir."""

    dry_run: bool = False
    """Print what the run will need, memory per GPU and time per step by part, and stop. Without a
    GPU the estimate is for H200s, as many as there are ranks."""
    max_steps: int = 800
    """Optimizer steps."""
    per_device_train_batch_size: int = 1
    """Prompts per micro-batch and rank; each gives num_generations images."""
    gradient_accumulation_steps: int = 1
    """Micro-batches per optimizer step. All prompts of a step are drawn in one rollout."""
    num_generations: int = 8
    """G, images per prompt: the group that the advantage is taken within."""
    num_iterations: int = 1
    """Optimizer steps taken on each rollout."""

    reward_funcs: list[str] | None = None
    """Rewards: image_nsc, text_nsc, image_entropy, text_entropy, constant, random; of images of the
    tiny model's world tiny_verifier, diversity, richness; or any `module:function` taking prompts
    and images. Default: image_nsc, with --cot true also text_nsc."""
    reward_weights: list[float] | None = None
    """A weight per reward, negative to minimise it; default: all 1."""
    reward_reduction: Literal["sum", "mean"] = "sum"
    """How an intrinsic reward is reduced over its tokens; the paper sums."""
    reward_distribution: Literal["conditional", "guided"] = "conditional"
    """Which distribution intrinsic rewards look at: the prompt's own, or the guided one that was
    sampled from."""
    policy_distribution: Literal["conditional", "guided"] = "conditional"
    """Which distribution is trained: the prompt's own (T2I-R1 and the paper), or the guided one
    that was sampled from, at the temperature and before top_k, top_p and min_p; that takes a second
    sequence for every image."""
    metric_funcs: list[str] | None = None
    """Measured on every step's images and on the picture grids, logged and never rewarded: any of
    the rewards that look at images. Default: tiny_verifier, diversity and richness with the prompts
    that come with the tiny model, otherwise none."""
    objective: Literal["grpo", "direct"] = "grpo"
    """How the reward is raised: by GRPO, or (direct, a control) by the gradient of the sampled
    tokens' own intrinsic reward, without groups or advantages."""
    beta: float = 0.01
    """Weight of the KL term to the reference model; 0 drops the reference."""
    epsilon: float = 0.2
    """Clip range of the probability ratio, below."""
    epsilon_high: float | None = None
    """Clip range above; default: epsilon."""
    rollout_correction: Literal["none", "tis"] = "none"
    """Correction for the sampler's log-probs differing from the trainer's (precision, kernels):
    tis multiplies a token's policy gradient by min(trainer / sampler probability,
    rollout_correction_cap)."""
    rollout_correction_cap: float = 2.0
    """Cap of that ratio."""
    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo"] = "grpo"
    """How token losses are normalised, as TRL names it."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """Whose standard deviation divides the advantage."""

    use_peft: bool = False
    """Train LoRA adapters on the decoder's projections instead of the weights: less memory, and the
    reference model is the policy without them. Use a learning rate about ten times higher."""
    lora_r: int = 16
    """Rank of the adapters."""
    lora_alpha: int = 32
    """Adapters count lora_alpha / lora_r."""
    lora_target_modules: list[str] = field(default_factory=lambda: list(PROJECTIONS))
    """Which of the decoder's projections have adapters."""
    optim: Literal["adamw_torch", "adamw_torch_bf16", "adamw_torch_8bit"] = "adamw_torch"
    """AdamW with float32 moments, with the first in bfloat16, or with 8-bit ones: 8, 6 or 2 bytes
    per trained parameter (LoRA's mostly keep float32). The latter two need torchao."""
    learning_rate: float = 1e-6
    """Peak learning rate of AdamW."""
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "linear"
    """Course of the learning rate after warm-up, to 0 at max_steps."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    adam_beta1: float = 0.9
    """AdamW's beta1."""
    adam_beta2: float = 0.999
    """AdamW's beta2."""
    adam_epsilon: float = 1e-8
    """AdamW's epsilon."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm; 0: never."""
    train_image_head: bool = False
    """Also train the image head; T2I-R1 and the paper keep everything `gen*` frozen."""
    offload_reference: bool = False
    """Keep the reference model in CPU memory, a block at a time on the GPU: less memory, slower."""
    gradient_checkpointing: bool = False
    """Recompute each block in the backward pass: less memory, a third more time."""
    torch_compile: bool = False
    """Run each block of the policy and the reference through torch.compile. The first steps take
    longer; a CPU needs a C++ compiler for it."""

    save_steps: int = 100
    """Steps between checkpoints; 0: only at the end."""
    save_total_limit: int = 2
    """Newest checkpoints kept."""
    sample_steps: int = 50
    """Steps between picture grids; 0: none. The same prompts and seeds every time."""
    num_sample_prompts: int = 4
    """Prompts in the picture grid, evenly spaced over the prompt file."""
    report_to: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    """Tracker to log to, besides metrics.jsonl."""
    ddp_timeout: int = 600
    """Seconds after which a collective that hears nothing from another rank fails."""

    def __post_init__(self) -> None:
        """Check every range and the settings against each other."""
        super().__post_init__()
        require_at_least(
            self, 1, "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps",
            "num_iterations", "save_total_limit", "num_sample_prompts", "ddp_timeout",
        )  # fmt: skip
        require(
            self.num_generations >= 2, "num_generations", self.num_generations,
            "give 2 or more: an advantage compares images of one prompt",
        )  # fmt: skip
        require_at_least(
            self, 0, "beta", "epsilon", "rollout_correction_cap", "learning_rate",
            "warmup_steps", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon",
            "max_grad_norm", "save_steps", "sample_steps",
        )  # fmt: skip
        require(self.temperature > 0, "temperature", self.temperature, "train above 0: groups of"
                " equal images teach nothing")  # fmt: skip
        for name in ("adam_beta1", "adam_beta2"):
            require(getattr(self, name) < 1, name, getattr(self, name), "give a number below 1")
        if self.epsilon_high is not None:
            require_at_least(self, 0, "epsilon_high")
        if self.reward_funcs is None:
            self.reward_funcs = ["image_nsc", "text_nsc"] if self.cot else ["image_nsc"]
        if self.metric_funcs is None:
            built_in = self.model == "tiny" and self.prompts is None
            self.metric_funcs = ["tiny_verifier", "diversity", "richness"] if built_in else []
        if self.reward_weights is None:
            self.reward_weights = [1.0] * len(self.reward_funcs)
        require(bool(self.reward_funcs), "reward_funcs", "[]", "name at least one reward")
        twice = [name for name in self.reward_funcs if self.reward_funcs.count(name) > 1]
        if twice:
            raise UserError(f"reward_funcs: {twice[0]} is named twice; name it once, with a weight")
        require(
            len(self.reward_weights) == len(self.reward_funcs), "reward_weights",
            self.reward_weights, f"give one for each of {', '.join(self.reward_funcs)}",
        )  # fmt: skip
        for weight in self.reward_weights:
            require(math.isfinite(weight), "reward_weights", weight, "give finite numbers")
        for name in self.reward_funcs:
            if name in REWARDS and REWARDS[name].kind == "text" and not self.cot:
                raise UserError(
                    f"reward_funcs: {name} looks at the chain of thought, and there is none; "
                    "add --cot true or drop it"
                )
        if self.objective == "direct":
            self._check_direct()
        if self.use_peft:
            self._check_lora()
        else:
            self._check_no_lora()
        if self.resume_from_checkpoint and self.output_dir is None:
            raise UserError(
                "resume_from_checkpoint: which run? add --output_dir with the folder to go on in"
            )

    def _check_direct(self) -> None:
        """Raise UserError unless the reward can be differentiated."""
        for name in self.reward_funcs or []:
            if name not in DIFFERENTIABLE:
                raise UserError(
                    f"objective: direct differentiates the reward, and {name} has no gradient; "
                    f"choose reward_funcs from {', '.join(DIFFERENTIABLE)}, or --objective grpo"
                )
        for name, value in (
            ("reward_distribution", "conditional"),
            ("policy_distribution", "conditional"),
            ("rollout_correction", "none"),
        ):
            if getattr(self, name) != value:
                raise UserError(
                    f"objective: direct works with {name} {value} alone, not "
                    f"{getattr(self, name)}; change one of the two"
                )

    def _check_lora(self) -> None:
        """Raise UserError unless the adapters can be made."""
        require_at_least(self, 1, "lora_r", "lora_alpha")
        require(bool(self.lora_target_modules), "lora_target_modules", "[]", "name at least one")
        for name in self.lora_target_modules:
            known = ", ".join(PROJECTIONS)
            require(name in PROJECTIONS, "lora_target_modules", name, f"choose from {known}")
        if self.train_image_head:
            raise UserError(
                "train_image_head: with --use_peft true adapters alone are trained; drop one of "
                "the two"
            )
        if self.offload_reference:
            raise UserError(
                "offload_reference: with --use_peft true the reference is the policy without its "
                "adapters, there is no copy to offload; drop one of the two"
            )

    def _check_no_lora(self) -> None:
        """Raise UserError where settings of adapters are given and none are asked for."""
        kind = TrainConfig
        usual = {"lora_r": kind.lora_r, "lora_alpha": kind.lora_alpha}
        for name, value in (usual | {"lora_target_modules": list(PROJECTIONS)}).items():
            require(
                getattr(self, name) == value, name, getattr(self, name), "it is of adapters, and "
                "none are trained: add --use_peft true, or leave it out",
            )  # fmt: skip

    @property
    def prompts_per_step(self) -> int:
        """Prompts that one rank draws for one rollout."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps


# The paper's hyperparameters; what it leaves open is T2I-R1's, but for a shorter chain of thought.
# 8 prompts x G 8 on one GPU.
PAPER = {"cot": True, "bf16": True, "max_steps": 800, "beta": 0.01, "learning_rate": 1e-6}
PRESETS: dict[str, dict[str, Any]] = {
    # Under three minutes on two CPU cores. The rate was chosen on seed 1 with an earlier state of
    # the model (three times as much took it to a KL of 0.7), the guidance by accuracy on held-out
    # prompts.
    "tiny": {
        "max_steps": 60,
        "per_device_train_batch_size": 2,
        "num_generations": 8,
        "learning_rate": 1e-4,
        "cfg_weight": 1.5,
        "cot": True,
        "max_completion_length": 24,
        "sample_steps": 30,
        "num_sample_prompts": 12,
        "save_steps": 30,
    },
    "janus-pro-1b": PAPER
    | {
        "model": "deepseek-ai/Janus-Pro-1B",
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
    },
    "janus-pro-7b": PAPER
    | {
        "model": "deepseek-ai/Janus-Pro-7B",
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
        "gradient_checkpointing": True,
        "optim": "adamw_torch_8bit",  # with float32 moments it does not fit one 141 GB card
    },
}


def require_at_least(config: SamplingConfig, least: float, *names: str) -> None:
    """Raise UserError for each named setting that is not a number >= `least`."""
    for name in names:
        value = getattr(config, name)
        require(math.isfinite(value) and value >= least, name, value, f"give a number >= {least:g}")


def to_yaml(config: SamplingConfig) -> str:
    """The settings as YAML that `--config` reads back to the same settings."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)
