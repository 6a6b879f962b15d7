"""The page and figure of an ablation, from numbers made by hand."""

import json
from dataclasses import asdict
from xml.etree import ElementTree

import pytest

from iris_fast.rewards.alignment import Alignment
from iris_fast.tiny import HELD_OUT_FILE
from iris_fast.tiny.recipe.ablation_figure import figure
from iris_fast.tiny.recipe.ablation_page import (
    INITIAL,
    MEASURES,
    OTHERS,
    claims,
    clear_sign,
    differences,
    foretold,
    foretold_table,
    mean_and_std,
    page,
    verdict,
)
from iris_fast.tiny.world import KINDS, WORLDS

ZEROS = dict.fromkeys([*KINDS, *MEASURES, *OTHERS], 0.0) | {"images": 880}
SEEDS = [11, 12, 13]


def a_world(alignment: float | None = None, **accuracies: list[float]) -> dict:
    """Arms with these accuracies for the first seeds, 0.4 before; all other measures are 0.

    With `alignment`, that of `nsc` from each seed, its opposite for `sc`.
    """
    arms = {
        name: {
            "settings": {},
            "before": ZEROS | {"mean": 0.4},
            "after": {
                str(seed): ZEROS | {"mean": mean, "kl": 0.1, "unchanged": name == "constant"}
                for seed, mean in zip(SEEDS, means, strict=False)
            },
        }
        for name, means in accuracies.items()
    }
    alignments = {}
    if alignment is not None:
        ours, theirs = (Alignment(sign * alignment, 0.04, 99)._asdict() for sign in (1, -1))
        found = {"terms": {"image_nsc": ours}, "arms": {"nsc": ours, "sc": theirs}}
        alignments = {str(seed): found for seed in SEEDS}
    return {"settings": asdict(WORLDS["shipped"]), "alignment": alignments, "arms": arms}


def results(**worlds: dict) -> dict:
    rest = {"commit": "c", "hardware": "h", "steps": 40, "pictures": 880}
    return {"seeds": SEEDS, "worlds": worlds, "not_run": [], "failed": {}, **rest}


def test_differences_are_per_seed_and_their_signs_decide():
    world = a_world(
        nsc=[0.5, 0.6, 0.7],
        sc=[0.4, 0.5, 0.6],
        direct=[0.6, 0.7],
        no_cot=[0.5, 0.6],
        image_nsc_text_nsc=[0.4, 0.5, 0.4],
        image_nsc_text_sc=[0.2, 0.2, 0.2],
    )
    assert [round(d, 3) for d in differences(world, "mean", "nsc", "sc")] == [0.1, 0.1, 0.1]
    assert [round(d, 3) for d in differences(world, "mean", "nsc", INITIAL)] == [0.1, 0.2, 0.3]
    assert differences(world, "mean", "constant", "nsc") == []
    assert differences(world, "mean", "constant", INITIAL) == []
    found = results(shipped=world, busy=a_world(nsc=[0.3, 0.3, 0.3]))
    rows = {
        line.split(" | ")[0].strip("| "): line
        for line in claims(found, found["worlds"]).splitlines()
    }
    helps = "| nsc vs initial model | agrees (+0.200) | disagrees (-0.100) |"
    assert rows["training with NSC improves images"].endswith(helps)
    assert "| image NSC, text NSC vs nsc | disagrees (-0.167) |" in rows["the text's NSC helps"]
    signs = "| image NSC, text NSC vs image NSC, text SC | agrees (+0.233) | not run |"
    assert rows["the text's reward is NSC, not SC"].endswith(signs)
    collapses = "| disagrees (-0.100), 2 of 3 seeds | not run |"
    assert rows["direct optimisation collapses"].endswith(collapses)
    assert "undecided (+0.000), 2 of 3 seeds" in rows["a chain of thought helps"]
    assert "not run" in rows["NSC is a better reward than entropy (backward KL)"]
    uniform = rows["rewarding certainty makes images uniform (diversity)"]
    assert "| undecided (+0.000) |" in uniform
    assert verdict([0.1, -0.1]) == verdict([]) == verdict([0.0, 0.1]) == "undecided"
    assert [mean_and_std([]), mean_and_std([0.25]), mean_and_std([0.25], "+")] == [
        "", "0.250", "+0.250",
    ]  # fmt: skip


def test_an_alignment_foretells_an_outcome_if_both_are_clear():
    def alignments(*values: float, error: float | None = 0.04) -> list[Alignment]:
        return [Alignment(value, error, 99) for value in values]

    assert clear_sign(alignments(0.3, 0.2, 0.1)) == 1
    assert clear_sign(alignments(-0.3, -0.2, -0.1)) == -1
    assert clear_sign(alignments(0.3, -0.3)) == 0
    assert clear_sign(alignments(0.3, 0.07)) == 0  # not two standard errors
    assert clear_sign(alignments(0.3, error=None)) == clear_sign([]) == 0
    assert foretold(alignments(0.3), [0.1, 0.2]) == "yes"
    assert foretold(alignments(-0.3), [-0.1, -0.2]) == "yes"
    assert foretold(alignments(-0.3), [0.1, 0.2]) == "no"
    assert foretold(alignments(0.3), [0.1, -0.2]) == "undecided"
    assert foretold(alignments(0.01), [0.1, 0.2]) == "undecided"


def test_alignments_stand_beside_the_outcomes():
    worlds = {
        "shipped": a_world(0.27, nsc=[0.5, 0.5, 0.5], sc=[0.3, 0.3, 0.3], random=[0.4]),
        "busy": a_world(-0.2, nsc=[0.5, 0.5, 0.5], sc=[]),
    }
    shown = foretold_table(worlds)
    assert "| shipped | nsc | +0.27 ± 0.04 | +0.100 | yes |" in shown
    assert "| shipped | sc | -0.27 ± 0.04 | -0.100 | yes |" in shown
    assert "| busy | nsc | -0.20 ± 0.04 | +0.100 | no |" in shown
    assert "random" not in shown
    assert "| busy | sc |" not in shown
    assert (
        "Of 3 arms, 3 have a clear alignment and a clear outcome; the sign was foretold for 2"
        in shown
    )
    assert foretold_table({"kept": a_world(nsc=[0.5])}).startswith("No arm has both")


def test_the_page_shows_what_is_there_and_says_what_is_not():
    found = results(
        shipped=a_world(0.2, nsc=[0.5, 0.6], constant=[0.4], entropy=[]), kept=a_world()
    )
    found["not_run"] = ["shipped/nsc-13", "kept/nsc-11", "kept/nsc-12"]
    found["failed"] = {"shipped/entropy-11": "broken"}
    text = page(found)
    assert "| nsc | 0.550 ± 0.071 | +0.150 ± 0.071 | 0.100 ± 0.000 |" in text
    assert "| initial model | 0.400 |  |  |" in text
    assert "\n| entropy" not in text
    assert "gradients of the arm constant were exactly 0" in text
    assert "- shipped: nsc-13\n- kept: nsc-11, nsc-12\n" in text
    assert "- shipped/entropy-11: broken\n" in text
    assert "- shipped: 30% of the things that captions name are missing; textures at " in text
    assert "## World: kept" not in text
    for table in text.split("\n\n"):
        if table.startswith("| "):
            lines = table.splitlines()
            assert len({line.count("|") for line in lines}) == 1, table
    assert page(results(shipped=a_world()))


def test_the_figure_has_one_panel_per_world_and_one_dot_per_run():
    worlds = {
        "shipped": a_world(0.2, nsc=[0.5, 0.6], direct=[0.0]),
        "busy": a_world(nsc=[0.3], sc=[]),
    }
    svg = figure(results(**worlds, kept=a_world()))
    root = ElementTree.fromstring(svg)
    assert svg.count("<circle") == 4
    assert "-0.40, off scale" in svg
    space = "{http://www.w3.org/2000/svg}"
    assert [node.text for node in root.iter(f"{space}tspan")] == ["shipped", "busy"]
    texts = [node.text for node in root.iter(f"{space}text")]
    assert "+0.20" in texts
    ElementTree.fromstring(figure(results(shipped=a_world())))


def test_the_committed_page_and_figure_show_the_committed_results():
    folder = HELD_OUT_FILE.parent / "recipe" / "ablation"
    if not (folder / "results.json").is_file():
        pytest.skip("no results of the present model are committed")
    committed = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert page(committed) == (folder / "ablation.md").read_text(encoding="utf-8")
    assert figure(committed) == (folder / "ablation.svg").read_text(encoding="utf-8")
    assert set(committed["worlds"]) == set(WORLDS)
