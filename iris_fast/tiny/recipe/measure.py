"""Measure the tiny model on the held-out prompts with the verifier, per GenEval kind.

    python -m iris_fast.tiny.recipe.measure [--samples 4] [--cot] [--cfg_weight 3] [--run FOLDER
                                            [--checkpoint step_00050]]
    python -m iris_fast.tiny.recipe.measure --verifier 2000

The first command samples images for every prompt and prints the share that the verifier accepts,
the images' diversity and richness, and NSC per token. The second measures the verifier itself on
new scenes: the share of true captions that it accepts and of wrong captions (of the same kind, not
true of the scene) that it rejects, on rendered images and on their VQ reconstructions.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL.Image import Image

from iris_fast.cli import CommandParser
from iris_fast.config import GenerateConfig
from iris_fast.errors import UserError, atomic_write, report_error, require
from iris_fast.models.images import decode_images, grid, save_png
from iris_fast.models.pretrained.load import LoadedJanus
from iris_fast.models.vq import VQModel
from iris_fast.preflight.inputs import open_model
from iris_fast.prompts import read_prompts
from iris_fast.records import Prompt
from iris_fast.rollout.sampler import Sampler
from iris_fast.run.metrics import trace_sums
from iris_fast.run.trained import open_trained
from iris_fast.tiny.captions import HELD_OUT_FILE, Caption, all_captions, satisfies, true_captions
from iris_fast.tiny.recipe.construct_vq import encode_all
from iris_fast.tiny.verifier import (
    broken_things,
    detect_objects,
    diversity,
    reward,
    richness,
    to_array,
)
from iris_fast.tiny.world import KINDS, Pixels, SceneObject, random_scene, render_all

PROGRAM = "iris_fast.tiny.recipe.measure"
# Measurements of the package's model on all held-out prompts.
MEASURED_FILE = Path(__file__).with_name("measured.json")
FRESH_SEED = 4711
PROMPTS_PER_BATCH = 10


def generate_images(
    loaded: LoadedJanus, config: GenerateConfig, prompts: list[Prompt], samples: int
) -> tuple[list[list[Image]], dict[str, float]]:
    """Sample `samples` images per prompt; also return NSC per image token and per text token."""
    tokens = loaded.config.image_tokens
    sampler = Sampler(loaded.model, loaded.tokenizer, config, tokens)
    images: list[Image] = []
    sums: Counter[str] = Counter()
    for first in range(0, len(prompts), PROMPTS_PER_BATCH):
        batch = [p for p in prompts[first : first + PROMPTS_PER_BATCH] for _ in range(samples)]
        rollout = sampler.rollout(batch, list(range(len(images), len(images) + len(batch))))
        images += decode_images(loaded.vq, rollout.codes_NI)
        columns = trace_sums("image", rollout.image) | trace_sums("text", rollout.text)
        sums.update({name: float(values.sum()) for name, values in columns.items()})
    nsc = {
        f"{kind}_nsc": sums[f"{kind}_nsc"] / sums[f"{kind}_tokens"]
        for kind in ("image", "text")
        if sums[f"{kind}_tokens"]
    }
    return [images[i : i + samples] for i in range(0, len(images), samples)], nsc


def image_metrics(prompts: list[Prompt], rows: list[list[Image]]) -> dict[str, float]:
    """`accuracy_by_kind`, mean diversity and mean richness of the images, one row per prompt."""
    arrays = [np.stack([to_array(image) for image in row]) for row in rows]
    return accuracy_by_kind(prompts, rows) | {
        "diversity": float(np.mean([diversity(row) for row in arrays])),
        "richness": float(np.mean([richness(image) for row in arrays for image in row])),
        "broken": broken_share(arrays),
    }


def broken_share(rows: list[Pixels]) -> float:
    """Share of the saturated regions of images [N, H, W, 3] that are broken things."""
    images = [image for row in rows for image in row]
    broken = sum(broken_things(image) for image in images)
    return broken / max(1, broken + sum(len(detect_objects(image)) for image in images))


def accuracy_by_kind(prompts: list[Prompt], rows: list[list[Image]]) -> dict[str, float]:
    """Share of images that the verifier accepts, per kind; `mean` is the mean of the kinds."""
    scores: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for prompt, row in zip(prompts, rows, strict=True):
        fields = [[prompt.extra[name]] * len(row) for name in ("include", "exclude")]
        scores[prompt.extra["tag"]] += reward([prompt.text] * len(row), row, *fields)
    shares = {kind: float(np.mean(values)) for kind, values in scores.items()}
    return shares | {"mean": float(np.mean(list(shares.values())))}


def verifier_rates(
    count: int, seed: int = FRESH_SEED, transform: Callable[[Pixels], Pixels] | None = None
) -> dict[str, tuple[float, float]]:
    """Per kind: the shares of true captions accepted and of wrong ones rejected on `count` scenes.

    `transform` changes the images before the verifier sees them.
    """
    rng = np.random.default_rng(seed)
    rates = {}
    for kind in KINDS:
        captions = all_captions(kind)
        scenes = [random_scene(kind, rng) for _ in range(count)]
        images = render_all(scenes)
        images = transform(images) if transform else images
        accepted = rejected = 0
        for scene, image in zip(scenes, images, strict=True):
            choices, detected = true_captions(scene, kind, rng), detect_objects(image)
            true = choices[rng.integers(len(choices))]
            accepted += satisfies(detected, true.include, true.exclude)
            wrong = _wrong_caption(scene.objects, captions, rng)
            rejected += not satisfies(detected, wrong.include, wrong.exclude)
        rates[kind] = (accepted / count, rejected / count)
    return rates


def _wrong_caption(
    objects: tuple[SceneObject, ...], captions: list[Caption], rng: np.random.Generator
) -> Caption:
    while True:
        caption = captions[rng.integers(len(captions))]
        if not satisfies(objects, caption.include, caption.exclude):
            return caption


def vq_reconstruction(vq: VQModel) -> Callable[[Pixels], Pixels]:
    """A function that encodes images with the VQ model and decodes them again."""

    def reconstruct(images: Pixels) -> Pixels:
        return np.stack([np.asarray(image) for image in decode_images(vq, encode_all(vq, images))])

    return reconstruct


def arguments() -> Namespace:
    """The parsed command line; UserError if it is not valid."""
    parser = CommandParser(prog=PROGRAM, description=__doc__.splitlines()[0])
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--model", default="tiny", help="model to measure; default: tiny")
    source.add_argument("--run", type=Path, help="run folder; a checkpoint of it is measured")
    parser.add_argument(
        "--checkpoint",
        help="of --run: newest (default), best (by the run's best_metric), or a name such as "
        "step_00050",
    )
    parser.add_argument("--prompts", default=str(HELD_OUT_FILE), help="default: held_out.jsonl")
    parser.add_argument("--samples", type=int, default=4, help="images per prompt; default: 4")
    parser.add_argument("--cfg_weight", type=float, default=3.0, help="guidance; default: 3")
    parser.add_argument("--cot", action="store_true", help="sample a chain of thought first")
    parser.add_argument("--seed", type=int, default=GenerateConfig.seed, help="default: 42")
    parser.add_argument("--grid", type=Path, help="PNG file for the images")
    parser.add_argument("--json", type=Path, help="JSON file that the measurements are added to")
    parser.add_argument(
        "--verifier", type=int, metavar="SCENES", help="measure the verifier on SCENES per kind"
    )
    parsed = parser.parse_args()
    for name in ("samples", "verifier"):
        value = getattr(parsed, name)
        require(value is None or value >= 1, name, value, "give 1 or more")
    named = parsed.checkpoint is None or parsed.run is not None
    require(named, "checkpoint", parsed.checkpoint, "it is one of a run: add --run FOLDER")
    return parsed


def print_verifier_rates(vq: VQModel, count: int) -> None:
    """Measure the verifier on `count` scenes per kind, rendered and reconstructed."""
    for name, transform in (("rendered", None), ("VQ", vq_reconstruction(vq))):
        for kind, (accepted, rejected) in verifier_rates(count, transform=transform).items():
            print(f"{name} {kind}: true accepted {accepted:.4f}, wrong rejected {rejected:.4f}")


def measure(loaded: LoadedJanus, options: Namespace) -> None:
    """Measure the model on the prompts; print the results and write the requested files."""
    config = GenerateConfig(
        cfg_weight=options.cfg_weight,
        cot=options.cot,
        max_completion_length=24,
        seed=options.seed,
    )
    prompts = read_prompts(options.prompts)
    rows, nsc = generate_images(loaded, config, prompts, options.samples)
    measured = image_metrics(prompts, rows) | nsc
    for name, value in measured.items():
        print(f"{name}: {value:.3f}")
    if options.json:
        results = json.loads(options.json.read_text()) if options.json.is_file() else {}
        settings = f"cfg_weight {config.cfg_weight:g}, cot {str(config.cot).lower()}"
        results[settings] = {"images": len(prompts) * options.samples} | {
            name: round(value, 4) for name, value in measured.items()
        }
        with atomic_write("json", options.json) as partial:
            partial.write_text(json.dumps(results, indent=2) + "\n")
    if options.grid:
        save_png(grid(rows, [prompt.text for prompt in prompts]), options.grid)


def main() -> int:
    """Run the command and return its exit code."""
    torch.set_num_threads(1)
    try:
        options = arguments()
        if options.run:
            loaded, _ = open_trained(options.run, options.checkpoint or "newest")
        else:
            loaded = open_model(options.model, torch.float32)
        if options.verifier:
            print_verifier_rates(loaded.vq, options.verifier)
        else:
            measure(loaded, options)
    except UserError as error:
        return report_error(PROGRAM, error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
