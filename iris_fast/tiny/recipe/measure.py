"""How well the model draws what it is asked, by the verifier, per GenEval kind.

    python -m iris_fast.tiny.recipe.measure [--model tiny] [--samples 4] [--cot] [--cfg_weight 3]
    python -m iris_fast.tiny.recipe.measure --verifier 2000

The first draws every held-out prompt; `--run FOLDER` does so with the newest weights of a training
run. `--grid FILE` also saves the pictures, `--json FILE` adds what was measured, under its
settings, to a file. The second measures the verifier itself, on fresh scenes: the share of true
captions it accepts and of wrong ones (of the same kind, not true of the scene) it refuses, on
renders and on their VQ reconstructions.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL.Image import Image

from iris_fast.config import GenerateConfig
from iris_fast.errors import UserError, atomic_write, report_error
from iris_fast.models.images import decode_images, grid
from iris_fast.models.pretrained.load import LoadedJanus
from iris_fast.models.vq import VQModel
from iris_fast.preflight.inputs import open_model
from iris_fast.prompts import read_prompts
from iris_fast.records import Prompt
from iris_fast.rollout.sampler import Sampler
from iris_fast.run.checkpoint import load_policy_weights, newest
from iris_fast.tiny.captions import HELD_OUT_FILE, Caption, all_captions, holds, true_captions
from iris_fast.tiny.recipe.pretrain_vq import encode_all
from iris_fast.tiny.verifier import diversity, reward, richness, see
from iris_fast.tiny.world import KINDS, Pixels, random_scene, render_all

# What was measured of the model that ships, on all held-out prompts.
MEASURED_FILE = Path(__file__).with_name("measured.json")
FRESH_SEED = 4711
PROMPTS_AT_A_TIME = 10


def open_trained(model: str, run: Path | None) -> LoadedJanus:
    """`model`, with the weights of the newest sound checkpoint of `run`; UserError if there is
    none."""
    checkpoint = open_model(model, torch.float32)
    if run is not None:
        path, _ = newest(run / "checkpoints")
        if path is None:
            raise UserError(f"run: {run} holds no sound checkpoint; train first")
        load_policy_weights(path, checkpoint.model)
    return checkpoint


def draw_held_out(
    checkpoint: LoadedJanus, config: GenerateConfig, prompts: list[Prompt], samples: int
) -> tuple[list[list[Image]], dict[str, float]]:
    """`samples` pictures of each prompt, and NSC per token of image and chain of thought."""
    tokens = checkpoint.config.image_tokens
    sampler = Sampler(checkpoint.model, checkpoint.tokenizer, config, tokens)
    pictures: list[Image] = []
    sums = {name: np.zeros(2) for name in ("image_nsc", "text_nsc")}
    for first in range(0, len(prompts), PROMPTS_AT_A_TIME):
        chosen = prompts[first : first + PROMPTS_AT_A_TIME]
        batch = [prompt for prompt in chosen for _ in range(samples)]
        numbers = list(range(len(pictures), len(pictures) + len(batch)))
        rollout = sampler.rollout(batch, numbers)
        pictures += decode_images(checkpoint.vq, rollout.codes_NI)
        for name, trace in (("image_nsc", rollout.image), ("text_nsc", rollout.text)):
            sums[name] += float(trace.conditional.nsc.sum()), int(trace.mask.sum())
    rows = [pictures[i : i + samples] for i in range(0, len(pictures), samples)]
    return rows, {name: total / count for name, (total, count) in sums.items() if count}


def measure_pictures(prompts: list[Prompt], rows: list[list[Image]]) -> dict[str, float]:
    """`model_accuracy`, and the mean diversity and richness."""
    arrays = [np.stack([np.asarray(picture) for picture in row]) for row in rows]
    return model_accuracy(prompts, rows) | {
        "diversity": float(np.mean([diversity(row) for row in arrays])),
        "richness": float(np.mean([richness(picture) for row in arrays for picture in row])),
    }


def model_accuracy(prompts: list[Prompt], rows: list[list[Image]]) -> dict[str, float]:
    """Share of pictures that the verifier accepts, by kind; and their plain mean."""
    marks: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for prompt, row in zip(prompts, rows, strict=True):
        fields = [[prompt.extra[name]] * len(row) for name in ("include", "exclude")]
        marks[prompt.extra["tag"]] += reward([prompt.text] * len(row), row, *fields)
    shares = {kind: float(np.mean(mine)) for kind, mine in marks.items()}
    return shares | {"mean": float(np.mean(list(shares.values())))}


def verifier_rates(
    count: int, seed: int = FRESH_SEED, redraw: Callable[[Pixels], Pixels] | None = None
) -> dict[str, tuple[float, float]]:
    """By kind: the share of true captions accepted, and of wrong ones refused, on `count` scenes.

    `redraw` changes the pictures before the verifier sees them.
    """
    rng = np.random.default_rng(seed)
    rates = {}
    for kind in KINDS:
        captions = all_captions(kind)
        scenes = [random_scene(kind, rng) for _ in range(count)]
        pictures = render_all(scenes)
        pictures = redraw(pictures) if redraw else pictures
        accepted = refused = 0
        for scene, picture in zip(scenes, pictures, strict=True):
            choices, things = true_captions(scene, kind, rng), see(picture)
            true = choices[rng.integers(len(choices))]
            accepted += holds(things, true.include, true.exclude)
            wrong = _wrong_caption(scene.things, captions, rng)
            refused += not holds(things, wrong.include, wrong.exclude)
        rates[kind] = (accepted / count, refused / count)
    return rates


def _wrong_caption(things: tuple, captions: list[Caption], rng: np.random.Generator) -> Caption:
    while True:
        caption = captions[rng.integers(len(captions))]
        if not holds(things, caption.include, caption.exclude):
            return caption


def reconstruct(vq: VQModel) -> Callable[[Pixels], Pixels]:
    """Pictures to codes and back."""

    def redraw(pictures: Pixels) -> Pixels:
        return np.stack([np.asarray(p) for p in decode_images(vq, encode_all(vq, pictures))])

    return redraw


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="iris_fast.tiny.recipe.measure", description=__doc__)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--run", type=Path)
    parser.add_argument("--prompts", default=str(HELD_OUT_FILE))
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--cfg_weight", type=float, default=3.0)
    parser.add_argument("--cot", action="store_true")
    parser.add_argument("--seed", type=int, default=GenerateConfig.seed)
    parser.add_argument("--grid", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--verifier", type=int, metavar="SCENES")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    checkpoint = open_trained(arguments.model, arguments.run)
    if arguments.verifier:
        for name, redraw in (("renders", None), ("VQ", reconstruct(checkpoint.vq))):
            for kind, (yes, no) in verifier_rates(arguments.verifier, redraw=redraw).items():
                print(f"{name} {kind}: true accepted {yes:.4f}, wrong refused {no:.4f}")
        return
    config = GenerateConfig(
        cfg_weight=arguments.cfg_weight,
        cot=arguments.cot,
        max_completion_length=24,
        seed=arguments.seed,
    )
    prompts = read_prompts(arguments.prompts)
    rows, certainty = draw_held_out(checkpoint, config, prompts, arguments.samples)
    found = measure_pictures(prompts, rows) | certainty
    for name, value in found.items():
        print(f"{name}: {value:.3f}")
    if arguments.json:
        known = json.loads(arguments.json.read_text()) if arguments.json.is_file() else {}
        settings = f"cfg_weight {config.cfg_weight:g}, cot {str(config.cot).lower()}"
        known[settings] = {"images": len(prompts) * arguments.samples} | {
            name: round(value, 4) for name, value in found.items()
        }
        with atomic_write("json", arguments.json) as partial:
            partial.write_text(json.dumps(known, indent=2) + "\n")
    if arguments.grid:
        grid(rows, [prompt.text for prompt in prompts]).save(arguments.grid)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(report_error("iris_fast.tiny.recipe.measure", error))
