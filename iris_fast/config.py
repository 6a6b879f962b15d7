"""Every setting, once, with its default, range and help. Imports neither torch nor the rest.

Field names are TRL's `GRPOConfig` wherever the meaning is the same, and Janus's for guidance.
Precedence: these defaults < `--preset` < `--config file.yaml` < flags.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from iris_fast import checks
from iris_fast.errors import UserError, require
from iris_fast.fields import check_bounds, defaults, number

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FP8_SETTINGS = ("kv_cache_dtype", "rollout_weight_dtype")

PRESETS = yaml.safe_load(Path(__file__).with_name("presets.yaml").read_text(encoding="utf-8"))
# The sections of --help and docs/settings.md: each starts at the setting named here and ends where
# the next one starts. A title may occur more than once.
SECTIONS = {
    "model": "Model and prompts",
    "cfg_weight": "Sampling",
    "rollout_engine": "Device and precision",
    "seed": "Sampling",
    "kv_cache_dtype": "Device and precision",
    "reward_funcs": "Rewards",
    "output_dir": "Run and output",
    "preset": "Run and output",
    "max_steps": "Steps and batches",
    "policy_distribution": "Objective",
    "use_peft": "LoRA",
    "optim": "Optimizer",
    "offload_reference": "Memory and speed",
    "save_steps": "Run and output",
}


def sections(config_class: type[Any]) -> dict[str, list[str]]:
    """Title -> names of its settings, in the order of the help."""
    found: dict[str, list[str]] = {}
    title = ""
    for name in defaults(config_class):
        title = SECTIONS.get(name, title)
        found.setdefault(title, []).append(name)
    return found


@dataclass(kw_only=True)
class SamplingConfig:
    """How images are sampled from prompts; shared by training and `iris_fast.generate`."""

    model: str = "tiny"
    """Folder of a Janus checkpoint (original or transformers layout), a hub id such as
    deepseek-ai/Janus-Pro-1B, or `tiny` for the small trained model of the package."""
    prompts: str | None = None
    """Prompt file: .txt (one prompt per line), .jsonl (field `prompt`; the other fields are passed
    to the rewards), or a Hugging Face datasets path. With --model tiny the default is the package's
    own file."""
    template: Literal["janus-pro", "janus-1.3b", "t2i-r1"] = "janus-pro"
    """Chat template: the role strings around a prompt."""
    cot: bool = False
    """Let the model first write a semantic chain of thought, then generate the image from
    `PROMPT. COT`."""
    cot_instruction: str | None = None
    """Text file with the chain-of-thought instruction; it contains the placeholder {prompt}."""
    max_prompt_length: int = number(512, ge=1)
    """Longest prompt accepted, in tokens."""
    max_completion_length: int = number(256, ge=1)
    """Longest chain of thought, in tokens; longer ones are truncated."""
    image_token_num_per_image: int | None = None
    """Tokens per image, a square number; default: as many as the checkpoint's image size needs."""
    cfg_weight: float = 5.0
    """Classifier-free guidance: logits = uncond + cfg_weight * (cond - uncond); 1: no guidance."""
    temperature: float = number(1.0, ge=0)
    """Sampling temperature of text and image tokens; 0: greedy, for generation only. The
    `conditional` statistics and, unless policy_distribution is guided, the log-probs that are
    trained on are taken at temperature 1."""
    top_k: int = number(0, ge=0)
    """Sample from the k most likely tokens; 0: all."""
    top_p: float = number(1.0, "; 1 is off", gt=0, le=1)
    """Sample from the most likely tokens that together have this probability; 1: all."""
    min_p: float = number(0.0, "; 0 is off", ge=0, le=1)
    """Drop tokens that are less likely than min_p times the most likely one; 0: none."""
    rollout_engine: Literal["auto", "static", "plain"] = "auto"
    """How tokens are decoded. static shares the keys and values of equal prompts, reads only those
    in use, and replays one CUDA graph per step on a GPU; plain keeps a copy per sequence and uses
    torch's attention. auto: static, except on a CPU without the kernels in C++. The tokens are the
    same up to rounding."""
    attn_implementation: Literal["auto", "sdpa", "varlen", "flash_attention_2", "xformers"] = "auto"
    """Attention over whole sequences, in training passes and for prompts. sdpa is torch's, on
    padded copies, and works everywhere. The others need no padding but a GPU and bf16: varlen is
    torch's own, flash_attention_2 and xformers need the packages flash-attn and xformers. auto:
    flash_attention_2 where it is installed, else varlen, else sdpa; the choice is printed and
    logged."""
    seed: int = 42
    """Seed of all random numbers. The same seed gives the same images for any batch size and any
    number of ranks, up to rounding of the logits."""
    kv_cache_dtype: Literal["auto", "fp8"] = "auto"
    """Data type of the KV cache while sampling. fp8 (e4m3) takes half the memory and traffic of
    bfloat16, changes the sampled tokens, and needs --rollout_engine static."""
    rollout_weight_dtype: Literal["auto", "fp8"] = "auto"
    """Data type of the decoder's projections while sampling. fp8 (e4m3, one scale per output
    channel and one per row of the input) takes half the traffic of bfloat16, keeps a second copy of
    the weights, changes the sampled tokens, and needs --rollout_engine static."""
    bf16: bool = False
    """Compute in bfloat16 (training keeps float32 master weights)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to run; auto: on the GPU if there is one."""
    reward_funcs: list[str] | None = None
    """Rewards: image_nsc, text_nsc, image_entropy, text_entropy, constant, random; for images of
    the tiny model's world tiny_verifier, diversity, richness; or any `module:function` that takes
    prompts and images. Default: image_nsc, with --cot true also text_nsc."""
    reward_weights: list[float] | None = None
    """One weight per reward, negative to minimise it; default: all 1."""
    reward_reduction: Literal["sum", "mean"] = "sum"
    """How an intrinsic reward is reduced over its tokens; the paper uses the sum."""
    reward_distribution: Literal["conditional", "guided"] = "conditional"
    """The distribution that intrinsic rewards are computed from: the conditional one, or the guided
    one that tokens are sampled from."""
    metric_funcs: list[str] | None = None
    """Computed for the images of every step and of the sample grids, and logged only: any reward
    that is computed from images. Default: tiny_verifier, diversity and richness with the prompts
    that come with the tiny model, otherwise none."""

    def __post_init__(self) -> None:
        check_bounds(self)
        for name in ("model", "prompts", "cot_instruction", "output_dir", "eval_prompts"):
            require(getattr(self, name, None) != "", name, "''", "give a value or leave it out")
        for name in FP8_SETTINGS:
            if getattr(self, name) == "fp8" and self.rollout_engine != "static":
                raise UserError(f"{name}: fp8 needs the static engine; add --rollout_engine static")
        tokens = self.image_token_num_per_image
        if tokens is not None:
            is_square = tokens >= 4 and math.isqrt(tokens) ** 2 == tokens
            remedy = "give a square number of at least 4, such as 576"
            require(is_square, "image_token_num_per_image", tokens, remedy)
        if self.prompts is None and self.model != "tiny":
            raise UserError(
                f"prompts: --model {self.model} needs a prompt file; add --prompts FILE "
                "(.txt with one prompt per line, or .jsonl with a field `prompt`)"
            )
        self._fill_rewards()

    def _fill_rewards(self) -> None:
        if self.reward_funcs is None:
            self.reward_funcs = ["image_nsc", "text_nsc"] if self.cot else ["image_nsc"]
        if self.metric_funcs is None:
            built_in = ["tiny_verifier", "diversity", "richness"]
            self.metric_funcs = built_in if self.has_built_in_prompts else []
        if self.reward_weights is None:
            self.reward_weights = [1.0] * len(self.reward_funcs)

    @property
    def has_built_in_prompts(self) -> bool:
        """Whether the prompts are those that come with the tiny model."""
        return self.model == "tiny" and self.prompts is None

    @property
    def guided(self) -> bool:
        """Whether images are sampled with classifier-free guidance."""
        return self.cfg_weight != 1


@dataclass(kw_only=True)
class GenerateConfig(SamplingConfig):
    """Settings of `python -m iris_fast.generate`."""

    output_dir: str = "images"
    """Folder for the images, named PROMPT_IMAGE.png, both numbered from 0."""
    num_images_per_prompt: int | None = number(None, ge=1)
    """Images per prompt; default: 1, with --alignment true 8."""
    alignment: bool = False
    """Also compute reward_funcs and metric_funcs for the images, print how the rewards order the
    images of a prompt compared with the metrics, and write alignment.json beside the images. To be
    looked at before a long run."""
    batch_size: int = number(16, ge=1)
    """Images sampled at a time. It affects speed and memory, and the images only where rounding of
    the logits decides between two tokens: rarely in float32, often in bfloat16."""
    greedy: bool = False
    """Take the most likely token instead of sampling."""
    save_codes: str | None = None
    """Also write the image tokens: an .npz file with `codes` [prompts, images, tokens]."""
    overwrite: bool = False
    """Replace existing images; without it, existing ones are an error."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.save_codes is not None:
            ends = self.save_codes.endswith(".npz")
            require(ends, "save_codes", self.save_codes, "give a name that ends in .npz")
        if self.num_images_per_prompt is None:
            self.num_images_per_prompt = 8 if self.alignment else 1
        if self.alignment:
            checks.check_alignment(self)


@dataclass(kw_only=True)
class TrainConfig(SamplingConfig):
    """Settings of `torchrun -m iris_fast.train`."""

    preset: Literal["tiny", "janus-pro-1b", "janus-pro-7b"] = "tiny"
    """A named set of defaults: tiny (offline, CPU), or settings for Janus-Pro (docs/janus.md)."""
    output_dir: str | None = None
    """Run folder; default: runs/PRESET-NNN, with the next free number."""
    resume_from_checkpoint: bool = False
    """Resume from the newest complete checkpoint in --output_dir."""
    dry_run: bool = False
    """Print an estimate of the memory per GPU and the time per step, by part, and stop. Without a
    GPU the estimate is for H200s, one per rank."""
    max_steps: int = number(800, ge=1)
    """Optimizer steps."""
    per_device_train_batch_size: int = number(1, ge=1)
    """Prompts per micro-batch and rank; each gives num_generations images."""
    gradient_accumulation_steps: int = number(1, ge=1)
    """Micro-batches per optimizer step. All prompts of a step are sampled in one rollout."""
    num_generations: int = number(8, ": an advantage compares images of one prompt", ge=2)
    """G, images per prompt: the group within which advantages are computed."""
    num_iterations: int = number(1, ge=1)
    """Optimizer steps per rollout."""
    policy_distribution: Literal["conditional", "guided"] = "conditional"
    """The distribution that is trained: the conditional one (T2I-R1 and the paper), or the guided
    one that tokens are sampled from, at the sampling temperature and before top_k, top_p and min_p;
    guided needs a second sequence per image."""
    objective: Literal["grpo", "direct"] = "grpo"
    """grpo, or direct (a control): the gradient of the sampled tokens' own intrinsic reward,
    without groups or advantages."""
    beta: float = number(0.01, ge=0)
    """Weight of the KL term to the reference model; 0: no reference model."""
    max_kl: float | None = number(None, gt=0)
    """Largest KL to the reference, the mean per token of a step (`kl` in the log), that is accepted
    without max_kl_action; default: no limit. Far from the reference a reward is exploited."""
    max_kl_action: Literal["warn", "stop"] = "stop"
    """Above max_kl: warn once, or stop the run with a checkpoint."""
    epsilon: float = number(0.2, ge=0)
    """Lower clip range of the probability ratio."""
    epsilon_high: float | None = number(None, ge=0)
    """Upper clip range; default: epsilon."""
    rollout_correction: Literal["none", "tis"] = "none"
    """Correction for differences between the log-probs of the sampler and the trainer (precision,
    kernels): tis multiplies a token's policy gradient by min(trainer / sampler probability,
    rollout_correction_cap)."""
    rollout_correction_cap: float = number(2.0, ge=0)
    """Upper limit of that ratio."""
    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo"] = "grpo"
    """How token losses are normalised, with TRL's names."""
    scale_rewards: Literal["group", "batch", "none"] = "group"
    """The standard deviation that advantages are divided by: of the group, of the batch, or none.
    """
    use_peft: bool = False
    """Train LoRA adapters on the decoder's projections instead of the weights. It needs less
    memory, and the reference model is the policy without adapters. Use a learning rate about ten
    times higher."""
    lora_r: int = number(16, ge=1)
    """Rank of the adapters."""
    lora_alpha: int = number(32, ge=1)
    """Adapters are scaled by lora_alpha / lora_r."""
    lora_target_modules: list[str] = field(default_factory=lambda: list(PROJECTIONS))
    """The decoder's projections that get adapters."""
    optim: Literal["adamw_torch", "adamw_torch_bf16", "adamw_torch_8bit"] = "adamw_torch"
    """AdamW with both moments in float32, with the first in bfloat16, or with both in 8 bits: 8, 6
    or 2 bytes per trained parameter (most of LoRA's stay float32). The latter two need torchao."""
    learning_rate: float = number(1e-6, ge=0)
    """Peak learning rate."""
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "linear"
    """Learning rate schedule after warmup; linear and cosine reach 0 at max_steps."""
    warmup_steps: int = number(0, ge=0)
    """Steps of linear warmup from 0."""
    weight_decay: float = number(0.0, ge=0)
    """AdamW's decoupled weight decay."""
    adam_beta1: float = number(0.9, ge=0, lt=1)
    """AdamW's beta1."""
    adam_beta2: float = number(0.999, ge=0, lt=1)
    """AdamW's beta2."""
    adam_epsilon: float = number(1e-8, ge=0)
    """AdamW's epsilon."""
    max_grad_norm: float = number(1.0, ge=0)
    """Gradients are clipped to this norm; 0: no clipping."""
    train_image_head: bool = False
    """Also train the image head; T2I-R1 and the paper freeze everything named `gen*`."""
    offload_reference: bool = False
    """Keep the reference model in CPU memory and move it to the GPU block by block: less memory,
    slower."""
    gradient_checkpointing: bool = False
    """Recompute each block in the backward pass: less memory, about a third slower."""
    torch_compile: bool = False
    """Compile each block of the policy and the reference with torch.compile. The first steps take
    longer; on a CPU it needs a C++ compiler."""
    save_steps: int = number(100, ge=0)
    """Steps between checkpoints; 0: only at the end."""
    save_total_limit: int = number(2, ge=1)
    """Number of newest checkpoints to keep."""
    best_metric: str | None = None
    """Also keep the best checkpoint by this metric, higher is better: reward, or one of
    metric_funcs or reward_funcs. A checkpoint is judged by the mean over the steps around it, up to
    half of save_steps on each side. `python -m iris_fast.export RUN TARGET --checkpoint best`
    exports it."""
    sample_steps: int = number(50, ge=0)
    """Steps between sample grids; 0: none. All grids use the same prompts and seeds."""
    num_sample_prompts: int = number(4, ge=1)
    """Prompts in a sample grid, evenly spaced over the prompt file."""
    eval_prompts: str | None = None
    """Held-out prompts, a file as for `prompts`: their images are measured with metric_funcs before
    the first step and after the last, with the same random numbers, for a standard error of the
    difference. none: no evaluation. Default: with the prompts that come with the tiny model its
    held-out ones, otherwise none."""
    num_generations_eval: int = number(4, ge=1)
    """Images per held-out prompt."""
    eval_steps: int = number(0, ge=0)
    """Steps between further evaluations of the held-out prompts; 0: only before and after."""
    report_to: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    """Tracker to log to, in addition to metrics.jsonl."""
    ddp_timeout: int = number(600, ge=1)
    """Seconds after which a collective that waits for another rank fails."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature == 0:
            raise UserError(
                "temperature: 0 gives identical images, whose advantages are 0; give a number > 0"
            )
        checks.check_rewards(self)
        checks.check_guard(self)
        checks.check_evaluation(self)
        if self.objective == "direct":
            checks.check_direct(self)
        if self.use_peft:
            checks.check_lora(self)
        else:
            checks.check_no_lora(self)
        if self.resume_from_checkpoint and self.output_dir is None:
            raise UserError(
                "resume_from_checkpoint: no run is named; add --output_dir with its folder"
            )

    @property
    def prompts_per_step(self) -> int:
        """Prompts per rollout and rank."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @property
    def samples_per_step(self) -> int:
        """Images per rollout and rank."""
        return self.prompts_per_step * self.num_generations

    @property
    def evaluates(self) -> bool:
        """Whether held-out prompts are measured."""
        if self.eval_prompts is None:
            return self.has_built_in_prompts and bool(self.metric_funcs)
        return self.eval_prompts != "none"


def to_yaml(config: SamplingConfig) -> str:
    """The settings as YAML that `--config` reads back to the same settings."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)
