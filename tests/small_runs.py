"""Small training runs, and what they write to disk."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from iris_kernels import TokenStats
from safetensors.torch import load_file
from torch import Tensor

from iris_fast.config import TrainConfig
from iris_fast.distributed import Ranks
from iris_fast.grpo.advantage import group_advantages
from iris_fast.grpo.policy import Models, build_models
from iris_fast.models.attention import PackedAttention
from iris_fast.models.pretrained.load import LoadedJanus
from iris_fast.preflight.inputs import SCALED_PRODUCT_ON_CPU, open_inputs
from iris_fast.prompts import PromptSource
from iris_fast.records import Rollout, Scored, Trace
from iris_fast.rewards.score import Scorer, load_rewards

# A step takes a fraction of a second and uses text and image.
QUICK: dict[str, Any] = {
    "cot": True,
    "per_device_train_batch_size": 1,
    "num_generations": 2,
    "max_completion_length": 4,
    "image_token_num_per_image": 4,
    "cfg_weight": 5.0,
    "metric_funcs": [],
    "eval_prompts": "none",
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "sample_steps": 0,
    "save_steps": 0,
    "max_steps": 2,
}
# Metrics that differ between two equal runs.
MEASURED = ("rollout_s", "train_s", "images_per_s", "peak_memory_bytes")

needs_scaled_products = pytest.mark.skipif(
    torch.__version__ < SCALED_PRODUCT_ON_CPU,
    reason="products with row scales on a CPU need torch 2.13",
)


def quick(output_dir: Path | str, **changes: Any) -> TrainConfig:
    """Settings of a quick run."""
    return TrainConfig(**_settings(changes) | {"output_dir": str(output_dir)})


def flags(**changes: Any) -> list[str]:
    """The settings of a quick run as a command line."""
    words = []
    for name, value in _settings(changes).items():
        words += [f"--{name}", str(value).lower() if isinstance(value, bool) else str(value)]
    return words


def _settings(changes: dict[str, Any]) -> dict[str, Any]:
    """With both rewards where there is text: the preset `tiny`, of commands, has one."""
    settings = QUICK | changes
    if settings["cot"] and "reward_funcs" not in changes:
        settings["reward_funcs"] = ["image_nsc", "text_nsc"]
    return settings


def open_run(config: TrainConfig, ranks: Ranks) -> tuple[Models, PromptSource]:
    """The models and prompts that a run with these settings starts from."""
    inputs = open_inputs(config, torch.float32)
    return build_models(inputs, config, ranks), PromptSource(inputs.prompts, config.seed)


def score(rollout: Rollout, config: TrainConfig, ranks: Ranks, decode: Any = None) -> Scored:
    """The rollout with its rewards and advantages; `decode` replaces the VQ."""
    functions = load_rewards(config.reward_funcs or [])
    scorer = Scorer.of(config, functions, rollout.prompts, decode)
    rewards = scorer.score(rollout)
    gathered = ranks.gather(rewards.total_N)
    advantages = group_advantages(gathered, config.num_generations, config.scale_rewards)
    return Scored.of(rollout, rewards, ranks.own_part(advantages))


def metrics(run: Path | str) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl, without `MEASURED`."""
    rows = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in rows]


def checkpoints(run: Path | str) -> list[str]:
    """Names of the checkpoints, oldest first."""
    return sorted(path.name for path in (Path(run) / "checkpoints").iterdir())


def tensors(run: Path | str, step: int) -> dict[str, Tensor]:
    """Weights and optimizer moments of a checkpoint that one rank wrote."""
    (file,) = (Path(run) / "checkpoints" / f"step_{step:05d}").glob("*.safetensors")
    return load_file(file)


def tree(folder: Path) -> dict[str, str]:
    """Every file below `folder` with a hash of its content."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def make_trace(lengths: list[int], seed: int) -> Trace:
    """Different statistics for every token; 0 at padding."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(max(lengths))[None] < torch.tensor(lengths)[:, None]

    def stats() -> TokenStats:
        fields = [torch.rand(mask.shape, generator=generator) + 1 for _ in TokenStats._fields]
        return TokenStats(*(field.masked_fill(~mask, 0.0) for field in fields))

    return Trace(conditional=stats(), guided=stats(), mask=mask)


@torch.no_grad()
def set_spread(loaded: LoadedJanus, text: float, image: float) -> None:
    """Scale both heads so that the logits of a typical prompt have these standard deviations."""
    janus = loaded.model
    ids = torch.tensor(loaded.tokenizer.encode("a small blue ball left of a large green cone"))
    attention = PackedAttention([len(ids)])
    hidden = janus.hidden_states(janus.embed_text(ids), torch.arange(len(ids)), attention)
    janus.lm_head.weight *= text / janus.text_logits(hidden).std()
    scale = image / janus.image_logits(hidden).std()
    for parameter in janus.model.generation_head.vision_head.parameters():
        parameter *= scale


def assert_same_run(left: Path | str, right: Path | str, step: int) -> None:
    """Bitwise equality of the metrics of every step, and of weights and moments after the last."""
    assert metrics(left) == metrics(right)
    ours, theirs = tensors(left, step), tensors(right, step)
    assert ours.keys() == theirs.keys()
    assert any(name.startswith("optimizer.") for name in ours)
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Memory of AdamW's moments, counted by storage."""
    total = 0
    for state in optimizer.state.values():
        for moment in (state["exp_avg"], state["exp_avg_sq"]):
            parts = [getattr(moment, name) for name in getattr(moment, "tensor_attrs", [])]
            total += sum(part.untyped_storage().nbytes() for part in parts or [moment])
    return total
