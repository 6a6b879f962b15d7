"""Rewards: each against its reduction by hand, their weighted sum, and functions of the user's."""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run
from PIL import Image
from small_runs import flags, make_trace, metrics, quick, score

from iris_fast.errors import UserError
from iris_fast.records import Prompt, Rollout, Trace
from iris_fast.rewards.intrinsic import intrinsic_reward
from iris_fast.rewards.score import load_metrics, load_rewards
from iris_fast.rewards.table import OF_IMAGES, REWARDS
from iris_fast.train import train


def by_hand(trace: Trace, distribution: str, statistic: str, reduction: str) -> list[float]:
    """Python loops over the tokens that are there."""
    values = getattr(getattr(trace, distribution), statistic)
    sums = []
    for row in range(4):
        tokens = [values[row, i].item() for i in range(values.shape[1]) if trace.mask[row, i]]
        sums.append(sum(tokens) / (1 if reduction == "sum" else len(tokens)))
    return sums


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("distribution", ["conditional", "guided"])
@pytest.mark.parametrize("kind", ["image", "text"])
@pytest.mark.parametrize("statistic", ["nsc", "entropy"])
def test_intrinsic_rewards_by_hand(rollout, kind, statistic, distribution, reduction):
    expected = by_hand(getattr(rollout, kind), distribution, statistic, reduction)
    found = intrinsic_reward(f"{kind}_{statistic}", rollout, distribution, reduction)
    assert found.tolist() == pytest.approx(expected, rel=1e-6)


def test_places_without_a_token_are_not_read(rollout):
    expected = intrinsic_reward("text_nsc", rollout, "conditional", "mean")
    rollout.text.conditional.nsc[~rollout.text.mask] = float("nan")
    assert torch.equal(intrinsic_reward("text_nsc", rollout, "conditional", "mean"), expected)


def test_text_rewards_of_no_text_are_0(rollout):
    none = make_trace([1] * 4, seed=2)
    none = dataclasses.replace(none, mask=torch.zeros(4, 1, dtype=torch.bool))
    rollout = dataclasses.replace(rollout, text=none)
    for reduction in ("sum", "mean"):
        assert intrinsic_reward("text_nsc", rollout, "guided", reduction).tolist() == [0] * 4


def scored(rollout: Rollout, ranks, rewards: list[str], decode: Any = None, **settings: Any):
    return score(rollout, quick("unused", reward_funcs=rewards, **settings), ranks, decode)


def test_the_reward_is_the_weighted_sum_of_its_terms(rollout, ranks):
    names = ["image_nsc", "text_entropy"]
    found = scored(rollout, ranks, names, reward_weights=[-1.0, 0.5], reward_reduction="mean")
    nsc = by_hand(rollout.image, "conditional", "nsc", "mean")
    entropy = by_hand(rollout.text, "conditional", "entropy", "mean")
    expected = [-a + 0.5 * b for a, b in zip(nsc, entropy, strict=True)]
    assert found.reward_N.tolist() == pytest.approx(expected, rel=1e-6)
    assert found.reward_terms["image_nsc"].tolist() == pytest.approx(nsc)  # before the weight


def test_advantages_are_taken_within_each_prompts_group(rollout, ranks):
    found = scored(rollout, ranks, ["image_nsc"])
    first, second = found.reward_N[:2], found.reward_N[2:]
    for group, advantages in ((first, found.advantage_N[:2]), (second, found.advantage_N[2:])):
        expected = (group - group.mean()) / (group.std() + 1e-4)
        torch.testing.assert_close(advantages, expected)


def test_a_negative_weight_negates_the_advantage(rollout, ranks):
    plus = scored(rollout, ranks, ["image_nsc"], reward_weights=[1.0])
    minus = scored(rollout, ranks, ["image_nsc"], reward_weights=[-1.0])
    torch.testing.assert_close(plus.advantage_N, -minus.advantage_N)


def test_the_constant_reward_gives_no_advantage(rollout, ranks):
    found = scored(rollout, ranks, ["constant"], reward_weights=[0.3])
    assert found.reward_terms["constant"].tolist() == [1] * 4
    assert found.advantage_N.tolist() == [0] * 4


def test_the_random_reward_depends_only_on_seed_and_sample(rollout):
    def function(rollout: Rollout, *reads) -> torch.Tensor:
        return intrinsic_reward("random", rollout, *reads)

    values = function(rollout, "conditional", "sum")
    assert len(set(values.tolist())) == 4
    assert ((values >= 0) & (values < 1)).all()
    torch.manual_seed(7)
    assert function(rollout.take([3, 1]), "conditional", "sum").tolist() == values[[3, 1]].tolist()
    other = dataclasses.replace(rollout, seed=43)
    assert (function(other, "conditional", "sum") != values).all()


# --- External functions ----------------------------------------------------------------------

MODULE = """
calls = []

def size(prompts, images):
    calls.append((prompts, images))
    return [len(prompt) for prompt in prompts]

def fields(prompts, images, n, color):
    calls.append((n, color))
    return n

def optional(prompts, images, color="none", scale=2.0):
    calls.append((color, scale))
    return [scale] * len(prompts)

def everything(prompts, images, **rest):
    calls.append(rest)
    return [0.0] * len(images)

def unknown_field(prompts, images, colour):
    return [0.0] * len(prompts)

def three(prompts, images):
    return [1.0, 2.0, 3.0]

def nan(prompts, images):
    return [0.0, float("nan"), 0.0, 0.0]

def infinite(prompts, images):
    return [0.0, 0.0, 0.0, float("-inf")]

def nothing(prompts, images):
    pass

def words(prompts, images):
    return ["good"] * len(prompts)

def raises(prompts, images):
    raise RuntimeError("no\\n  colour")

def leaves(prompts, images):
    raise SystemExit(0)

def huge(prompts, images):
    return [0.0, 1e300, 0.0, 0.0]

def empties(prompts, images):
    images.clear()
    return [0.0] * len(prompts)

class Scorer:
    def __call__(self, prompts, images):
        return (i for i in range(len(prompts)))

scorer = Scorer()
constant = 3
"""


@pytest.fixture
def my_rewards(here: Path, monkeypatch, request):
    """A module of rewards in the current folder, under a name of its own."""
    name = f"rewards_{abs(hash(request.node.nodeid))}"
    (here / f"{name}.py").write_text(MODULE)
    monkeypatch.syspath_prepend(here)
    return name


@pytest.fixture
def call(my_rewards, rollout, ranks):
    """Scores `rollout` with one function of the module; its values, and what it was called with."""
    images = [Image.new("RGB", (2, 2), (shade, 0, 0)) for shade in range(4)]

    def call(function: str) -> tuple[list[float], list[Any]]:
        name = f"{my_rewards}:{function}"
        found = scored(rollout, ranks, [name], lambda codes_NI: images)
        return found.reward_terms[name].tolist(), sys.modules[my_rewards].calls

    return call


def test_a_function_gets_prompts_and_images_in_order(call):
    values, calls = call("size")
    assert values == [6, 6, 6, 6]
    ((prompts, images),) = calls
    assert prompts == ["a cube", "a cube", "a ball", "a ball"]
    assert [image.getpixel((0, 0))[0] for image in images] == [0, 1, 2, 3]


def test_a_parameter_named_like_a_field_gets_its_values(call):
    values, calls = call("fields")
    assert values == [1, 1, 2, 2]
    assert calls == [([1, 1, 2, 2], [None, None, "red", "red"])]


def test_other_parameters_keep_their_defaults(call):
    values, calls = call("optional")
    assert values == [2.0] * 4
    assert calls == [([None, None, "red", "red"], 2.0)]


def test_kwargs_get_every_field(call):
    assert call("everything")[1] == [{"n": [1, 1, 2, 2], "color": [None, None, "red", "red"]}]


def test_any_callable_and_any_iterable_will_do(call):
    assert call("scorer")[0] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("three", "returned 3 numbers for 4 images; return one per image"),
        ("nan", r"returned nan \(in float32\) for the prompt 'a cube'; return a finite number"),
        ("infinite", r"returned -inf \(in float32\) for the prompt 'a ball'"),
        ("nothing", "did not return a list of numbers"),
        ("words", "did not return a list of numbers.*good"),
        ("raises", r"raised RuntimeError: no colour \(.*\.py:\d+\); fix the function"),
        ("leaves", r"raised SystemExit: 0 \(.*\.py:\d+\)"),
        ("huge", r"returned inf \(in float32\) for the prompt 'a cube'; return a finite number"),
        ("unknown_field", "fields color, n: missing a required argument: 'colour'"),
        ("absent", "has no function 'absent'"),
        ("constant", "has no function 'constant'"),
    ],
)
def test_an_unusable_function_is_reported_by_name(call, my_rewards, function, message):
    with pytest.raises(UserError, match=f"^reward_funcs: {my_rewards}:{function}.*{message}"):
        call(function)


def test_a_function_that_empties_its_list_does_not_affect_the_next(my_rewards, rollout, ranks):
    images = [Image.new("RGB", (2, 2), (shade, 0, 0)) for shade in range(4)]
    names = [f"{my_rewards}:empties", f"{my_rewards}:size"]
    scored(rollout, ranks, names, lambda codes_NI: images)
    assert sys.modules[my_rewards].calls[-1][1] == images


@pytest.mark.parametrize("line", ["undefined_name", "raise SystemExit(0)", "1 / 0"])
def test_a_module_that_cannot_be_imported_is_reported(here, monkeypatch, line):
    name = f"broken_{abs(hash(line))}"
    (here / f"{name}.py").write_text(f"import os\n{line}\n")
    monkeypatch.syspath_prepend(here)
    with pytest.raises(UserError, match=rf"importing {name} raised .*{name}\.py:2\); fix"):
        load_rewards([f"{name}:f"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent_module:f", "No module named 'absent_module'; write module:function"),
        ("os.absent:f", "No module named 'os.absent'"),
        ("bogus", r"there is no reward 'bogus'; choose from image_nsc, .*module:function"),
        (":f", "is not of the form module:function"),
        ("os:", "is not of the form module:function"),
        ("a b:c", "is not of the form module:function"),
    ],
)
def test_an_unknown_reward_is_reported(name, message):
    with pytest.raises(UserError, match=f"^reward_funcs: .*{message}"):
        load_rewards([name])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("image_nsc", r"'image_nsc' is not an image metric; choose from tiny_verifier, .*"),
        ("os.absent:f", "os.absent:f: No module named 'os.absent'"),
        ("tiny_verifier", "tiny_verifier cannot be called .*missing a required argument"),
    ],
)
def test_an_unusable_metric_is_reported(name, message):
    with pytest.raises(UserError, match=f"^metric_funcs: {message}"):
        load_metrics([name], [Prompt("a cube")])


def test_metrics_do_not_change_the_rewards(my_rewards, rollout, ranks):
    images = [Image.new("RGB", (32, 32), (grey, 0, 0)) for grey in (0, 0, 0, 255)]
    alone = scored(rollout, ranks, ["image_nsc"])
    decode = {"decode": lambda codes_NI: images, "metric_funcs": ["diversity"]}
    found = scored(rollout, ranks, ["image_nsc"], **decode)
    assert found.metrics["diversity"].tolist() == pytest.approx([0, 0, 3**-0.5, 3**-0.5])
    assert torch.equal(found.reward_N, alone.reward_N)
    assert alone.metrics == {}


def test_images_are_decoded_once_and_only_for_functions_of_images(my_rewards, rollout, ranks):
    decoded = []

    def images(codes_NI: torch.Tensor) -> list[Image.Image]:
        decoded.append(1)
        return [Image.new("RGB", (2, 2))] * 4

    scored(rollout, ranks, [name for name in REWARDS if name not in OF_IMAGES], images)
    assert decoded == []
    scored(rollout, ranks, [f"{my_rewards}:size", f"{my_rewards}:scorer"], images)
    assert decoded == [1]


def test_a_field_that_a_whole_batch_lacks_is_none(here, my_rewards):
    """Which lines meet in a batch is chance: the call is the same for all."""
    lines = ['{"prompt": "a"}', '{"prompt": "b", "n": 1, "color": "red"}', '{"prompt": "c"}']
    (here / "p.jsonl").write_text("\n".join(lines))
    (here / "seen_fields.py").write_text(
        "seen = []\n"
        "def reward(prompts, images, n):\n"
        "    seen.extend(zip(prompts, n))\n"
        "    return [0.0] * len(prompts)\n"
    )
    train(quick("run", prompts="p.jsonl", reward_funcs=["seen_fields:reward"], max_steps=3))
    import seen_fields

    assert set(seen_fields.seen) == {("a", None), ("b", 1), ("c", None)}


def test_a_users_reward_is_trained_on(here):
    (here / "brightness.py").write_text(
        "def reward(prompts, images):\n"
        "    return [sum(image.resize((1, 1)).getpixel((0, 0))) for image in images]\n"
    )
    settings = flags(reward_funcs="[brightness:reward, image_nsc]", reward_weights="[0.01, 1]")
    finished = run("iris_fast.train", *settings, "--output_dir", "run", cwd=here)
    assert (finished.code, finished.err) == (0, "")
    for row in metrics(here / "run"):
        terms = row["rewards/brightness:reward"], row["rewards/image_nsc"]
        assert row["reward"] == pytest.approx(0.01 * terms[0] + terms[1], rel=1e-5)
        assert 0 <= terms[0] <= 3 * 255


def test_a_failing_reward_is_one_line_on_the_command(here):
    (here / "broken.py").write_text("def reward(prompts, images):\n    return [1.0]\n")
    settings = flags(reward_funcs="[broken:reward]")
    finished = run("iris_fast.train", *settings, "--output_dir", "run", cwd=here)
    assert finished.code == 2
    assert "broken:reward returned 1 numbers for 2 images" in finished.error_line


def test_weights_may_be_infinitely_small_but_not_infinite():
    with pytest.raises(UserError, match=r"reward_weights: \[inf\] .*finite"):
        quick("unused", reward_funcs=["random"], reward_weights=[math.inf])
    assert quick("unused", reward_funcs=["random"], reward_weights=[0.0]).reward_weights == [0.0]
