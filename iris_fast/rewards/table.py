"""Every reward that has a name: what it reads and what it can be used for.

A new built-in reward is one row here. Rewards of the user need no row: `module:function` names
them. This module imports nothing of the project, so that the command line can read it before torch
is imported.
"""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Reward:
    """One row of the table.

    `kind`: image and text reduce a statistic of these tokens; control ignores what was sampled;
    external is a function of the images. `statistic`: the field of `iris_kernels.TokenStats`, or
    `module:function` of an external reward. `differentiable`: `--objective direct` can follow its
    gradient. `title`: its name in the report.
    """

    kind: Literal["image", "text", "control", "external"]
    statistic: str
    differentiable: bool
    title: str


REWARDS = {
    "image_nsc": Reward("image", "nsc", True, "NSC, image"),
    "text_nsc": Reward("text", "nsc", True, "NSC, text"),
    "image_entropy": Reward("image", "entropy", True, "entropy, image"),
    "text_entropy": Reward("text", "entropy", True, "entropy, text"),
    "constant": Reward("control", "", False, "constant"),
    "random": Reward("control", "", False, "random"),
    "tiny_verifier": Reward(
        "external", "iris_fast.tiny.verifier:reward", False, "correct (verifier)"
    ),
    "diversity": Reward("external", "iris_fast.tiny.verifier:diversity_reward", False, "diversity"),
    "richness": Reward("external", "iris_fast.tiny.verifier:richness_reward", False, "richness"),
}
DIFFERENTIABLE = [name for name, reward in REWARDS.items() if reward.differentiable]
OF_IMAGES = [name for name, reward in REWARDS.items() if reward.kind == "external"]


def is_external(name: str) -> bool:
    """Whether the reward `name` is a function of the images: a row of that kind, or the user's."""
    return name not in REWARDS or REWARDS[name].kind == "external"


def title(name: str) -> str:
    """The name of a reward or metric in the report."""
    return REWARDS[name].title if name in REWARDS else name
