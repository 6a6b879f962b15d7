"""Markdown page of an ablation's results, for `iris_fast.tiny.recipe.ablate`.

It shows everything that has been measured and names what has not. `PAPER` lists the paper's claims;
the rule in `verdict` decides whether a world reproduces each of them.
"""

from __future__ import annotations

from statistics import fmean, stdev
from typing import Any

from iris_fast.rewards.alignment import Alignment
from iris_fast.tiny.world import KINDS

Results = dict[str, Any]
World = dict[str, Any]

INITIAL = "initial model"
LABELS = {
    "entropy": "entropy (backward KL)",
    "image_nsc_text_nsc": "image NSC, text NSC",
    "image_nsc_text_sc": "image NSC, text SC",
    "image_sc_text_nsc": "image SC, text NSC",
    "no_cot": "no chain of thought",
    "direct": "direct optimisation",
}
# (measure, arm, other) -> what the paper (arXiv 2509.25562) claims, or which choice of its method
# the two arms differ in. Agreement means that the first arm has more of the measure.
PAPER = {
    ("mean", "nsc", INITIAL): "training with NSC improves images",
    ("mean", "nsc", "sc"): "rewarding uncertainty, not certainty, improves images",
    ("mean", "nsc", "entropy"): "NSC is a better reward than entropy (backward KL)",
    ("mean", "image_nsc_text_nsc", "nsc"): "the text's NSC helps",
    ("mean", "image_nsc_text_nsc", "image_nsc_text_sc"): "the text's reward is NSC, not SC",
    ("mean", "image_nsc_text_nsc", "image_sc_text_nsc"): "the image's reward is NSC, not SC",
    ("mean", "nsc", "no_cot"): "a chain of thought helps",
    ("mean", "nsc", "direct"): "direct optimisation collapses",
    ("diversity", "nsc", "sc"): "rewarding certainty makes images uniform",
    ("richness", "nsc", "sc"): "rewarding certainty makes images simple",
}
MEASURES = {"mean": "accuracy", "diversity": "diversity", "richness": "richness"}
OTHERS = {
    "image_nsc": "NSC image",
    "text_nsc": "NSC text",
    "diversity": "diversity",
    "richness": "richness",
    "broken": "broken",
}


def page(results: Results) -> str:
    """The results as Markdown."""
    seeds = ", ".join(map(str, results["seeds"]))
    worlds = {name: world for name, world in results["worlds"].items() if has_results(world)}
    parts = [
        "# Rewards compared in the tiny world",
        f"{results['steps']} training steps from each of the seeds {seeds}, with the "
        "hyperparameters of the preset `tiny`. Every model is measured on "
        f"{results['pictures']} images of held-out prompts, with the same random numbers before "
        "and after training. Accuracy is the share of images that the verifier accepts, averaged "
        "over the six kinds of prompts. Values are mean ± standard deviation over the seeds. "
        f"Commit {results['commit']}; {results['hardware']}.",
        "\n".join(f"- {name}: {describe(world)}" for name, world in results["worlds"].items()),
        "![Change of accuracy by world and arm](ablation.svg)",
        "Dots are runs, bars the mean of an arm; right: alignment of the arm's reward with the "
        "verifier before training. Values outside the axis are shown at its edge.",
        "## The paper's claims",
        claims(results, worlds),
        "`nsc` rewards NSC of the image alone. In brackets: the first of the compared arms minus "
        "the second in accuracy, or in the measure named. Differences are per seed. A world agrees "
        "if the difference is positive for every seed, disagrees if it is negative for every seed, "
        "and is undecided otherwise. With three seeds and no effect, one claim in four is decided "
        "by chance.",
        "## Known before training?",
        foretold_table(worlds),
        "Alignment: Spearman's rank correlation of the arm's reward with the verifier within "
        "groups of 8 images of the training prompts, sampled from the initial model; mean over the "
        "seeds ± the mean standard error of one seed. It is clear if, for every seed, it has the "
        "same sign and is more than two standard errors from 0. Foretold: whether a clear sign is "
        "that of the change of accuracy, if that has the same sign for every seed too.",
        term_lines(worlds),
        *(section for name, world in worlds.items() for section in world_sections(name, world)),
        *_not_run(results),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def has_results(world: World) -> bool:
    """Whether anything of a world has been measured."""
    return bool(world["alignment"]) or any(arm["before"] for arm in world["arms"].values())


def describe(world: World) -> str:
    """What a world's pictures are like."""
    settings = world["settings"]
    missing = f"{settings['omission']:.0%} of the things that captions name are missing"
    speckled = f", {settings['speckled']:.0%} of these speckled" if settings["speckled"] else ""
    return f"{missing}; textures at random: {textured_parts(world)}{speckled}"


def textured_parts(world: World) -> str:
    """Which parts of a picture have textures at random."""
    parts = {"things": "textured", "ground": "busy_ground"}
    named = [name for name, setting in parts.items() if world["settings"][setting]]
    return " and ".join(named) or "none"


def claims(results: Results, worlds: dict[str, World]) -> str:
    """Table of the paper's claims: the compared arms, every world's verdict and difference."""
    lines = [f"| the paper | compared | {' | '.join(worlds)} |", "|---|---|" + "---|" * len(worlds)]
    for (measure, arm, other), claim in PAPER.items():
        cells = []
        for world in worlds.values():
            values = differences(world, measure, arm, other)
            cell = f"{verdict(values)} ({fmean(values):+.3f})" if values else "not run"
            if 0 < len(values) < len(results["seeds"]):
                cell += f", {len(values)} of {len(results['seeds'])} seeds"
            cells.append(cell)
        named = "" if measure == "mean" else f" ({MEASURES[measure]})"
        pair = " vs ".join(LABELS.get(name, name) for name in (arm, other))
        lines.append(f"| {claim}{named} | {pair} | {' | '.join(cells)} |")
    return "\n".join(lines)


def differences(world: World, measure: str, name: str, other: str) -> list[float]:
    """Per seed: a measure of arm `name` minus that of arm `other` or of the initial model."""
    arm = world["arms"].get(name, {"before": None, "after": {}})
    ours = {seed: run[measure] for seed, run in arm["after"].items()}
    if other == INITIAL:
        return [value - arm["before"][measure] for value in ours.values()]
    theirs = world["arms"].get(other, {"after": {}})["after"]
    return [ours[seed] - theirs[seed][measure] for seed in ours if seed in theirs]


def changes(arm: dict[str, Any]) -> list[float]:
    """Per seed: accuracy after training minus before."""
    return [run["mean"] - arm["before"]["mean"] for run in arm["after"].values()]


def common_sign(values: list[float]) -> int:
    """1 or -1 if all values have this sign, else 0."""
    if not values:
        return 0
    return int(min(values) > 0) - int(max(values) < 0)


def verdict(values: list[float]) -> str:
    """Whether differences that the paper claims to be positive are so for every seed."""
    return {1: "agrees", -1: "disagrees", 0: "undecided"}[common_sign(values)]


def arm_alignments(world: World, arm: str) -> list[Alignment]:
    """Per seed: the alignment of the arm's reward with the verifier, where it was measured."""
    found = [seed["arms"][arm] for seed in world["alignment"].values() if arm in seed["arms"]]
    return [alignment for kept in found if (alignment := Alignment(**kept)).value is not None]


def clear_sign(alignments: list[Alignment]) -> int:
    """The common sign, if all are more than two standard errors from 0, else 0."""
    errors = [found.standard_error for found in alignments]
    if any(
        error is None or abs(found.value) <= 2 * error
        for found, error in zip(alignments, errors, strict=True)
    ):
        return 0
    return common_sign([found.value for found in alignments])


def foretold(alignments: list[Alignment], outcome: list[float]) -> str:
    """Whether the sign of the alignment before training was that of the outcome."""
    before, after = clear_sign(alignments), common_sign(outcome)
    if not before or not after:
        return "undecided"
    return "yes" if before == after else "no"


def show_alignment(alignments: list[Alignment]) -> str:
    """`mean over seeds ± mean standard error`."""
    if not alignments:
        return "not known"
    errors = [found.standard_error for found in alignments if found.standard_error is not None]
    error = f" ± {fmean(errors):.2f}" if errors else ""
    return f"{fmean(found.value for found in alignments):+.2f}{error}"


def foretold_table(worlds: dict[str, World]) -> str:
    """Alignment before training beside the change of accuracy, for every arm that has both."""
    lines = ["| world | arm | alignment | accuracy | foretold |", "|---|---|---|---|---|"]
    outcomes = []
    for name, world in worlds.items():
        for label, arm in world["arms"].items():
            alignments = arm_alignments(world, label)
            if not alignments or not arm["after"]:
                continue
            outcomes.append(foretold(alignments, changes(arm)))
            lines.append(
                f"| {name} | {LABELS.get(label, label)} | {show_alignment(alignments)} | "
                f"{fmean(changes(arm)):+.3f} | {outcomes[-1]} |"
            )
    if not outcomes:
        return "No arm has both an alignment and an outcome yet."
    decided = len(outcomes) - outcomes.count("undecided")
    return "\n".join(lines) + (
        f"\n\nOf {len(outcomes)} arms, {decided} have a clear alignment and a clear outcome; "
        f"the sign was foretold for {outcomes.count('yes')} of these."
    )


def term_lines(worlds: dict[str, World]) -> str:
    """One line per world: the alignment of every reward term."""
    lines = []
    for name, world in worlds.items():
        seeds = list(world["alignment"].values())
        if not seeds:
            continue
        shown = []
        for term in seeds[0]["terms"]:
            found = [Alignment(**seed["terms"][term]) for seed in seeds]
            shown.append(f"{term} {show_alignment([a for a in found if a.value is not None])}")
        groups = "/".join(str(seed["terms"]["image_nsc"]["groups"]) for seed in seeds)
        lines.append(f"- Terms in {name} ({groups} groups): {', '.join(shown)}")
    return "\n".join(lines)


def world_sections(name: str, world: World) -> list[str]:
    """Heading and tables of a world: accuracy, accuracy by kind, other measures."""
    arms, rows = world["arms"], initial_rows(world)
    outcome = ["| arm | accuracy | change | KL |", "|---|---|---|---|"]
    outcome += [f"| {label} | {before['mean']:.3f} |  |  |" for label, before in rows.items()]
    for label, arm in arms.items():
        runs = list(arm["after"].values())
        if runs:
            shown = [
                mean_and_std([run["mean"] for run in runs]),
                mean_and_std(changes(arm), "+"),
                mean_and_std([run["kl"] for run in runs]),
            ]
            outcome.append(f"| {LABELS.get(label, label)} | {' | '.join(shown)} |")
    once = [label for label, arm in arms.items() if any(r["unchanged"] for r in _runs(arm))]
    note = (
        f"All gradients of the arm {', '.join(once)} were exactly 0: its trained model is the "
        "initial one, and one seed was run."
    )
    return [
        f"## World: {name}",
        f"{describe(world).capitalize()}.",
        "\n".join(outcome),
        "KL is the divergence from the initial model per token in the last training step, in nats. "
        + (note if once else ""),
        means_table(world, {kind: kind.replace("_", " ") for kind in KINDS}),
        means_table(world, OTHERS),
        "Means over the seeds. NSC is per token, in nats. Broken: share of saturated regions that "
        "are no thing.",
    ]


def means_table(world: World, measures: dict[str, str]) -> str:
    """Table with one row per arm and initial model, one column per measure."""
    lines = [f"| arm | {' | '.join(measures.values())} |", "|---|" + "---|" * len(measures)]
    rows = {label: [before] for label, before in initial_rows(world).items()}
    rows |= {LABELS.get(label, label): _runs(arm) for label, arm in world["arms"].items()}
    for label, runs in rows.items():
        values = [[run[key] for run in runs if key in run] for key in measures]
        shown = [f"{fmean(found):.3f}" if found else "" for found in values]
        if runs:
            lines.append(f"| {label} | {' | '.join(shown)} |")
    return "\n".join(lines)


def initial_rows(world: World) -> dict[str, dict[str, float]]:
    """Label -> measurements of the initial model, one per distinct sampling setting."""
    found: dict[str, tuple[str, dict[str, float]]] = {}
    for name, arm in world["arms"].items():
        if arm["before"]:
            found.setdefault(str(arm["before"]), (name, arm["before"]))
    labels = (INITIAL, *(f"{INITIAL}, as {LABELS.get(n, n)}" for n, _ in [*found.values()][1:]))
    return {label: before for label, (_, before) in zip(labels, found.values(), strict=False)}


def mean_and_std(values: list[float], sign: str = "") -> str:
    """`mean ± standard deviation`, the mean alone for one value, nothing for none."""
    if not values:
        return ""
    return f"{fmean(values):{sign}.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")


def _runs(arm: dict[str, Any]) -> list[dict[str, Any]]:
    return list(arm["after"].values())


def _not_run(results: Results) -> list[str]:
    parts = []
    if results["not_run"]:
        by_world: dict[str, list[str]] = {}
        for name in results["not_run"]:
            world, _, run = name.partition("/")
            by_world.setdefault(world, []).append(run)
        parts += ["## Not run", "\n".join(f"- {w}: {', '.join(r)}" for w, r in by_world.items())]
    if results["failed"]:
        parts += ["## Failed", "\n".join(f"- {k}: {v}" for k, v in results["failed"].items())]
    return parts
