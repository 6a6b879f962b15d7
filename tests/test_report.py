"""report.html: complete, self-contained, accessible; and how it looks in a browser."""

from __future__ import annotations

import html.parser
import json
import re
import shlex
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from small_runs import quick

from iris_fast.cli import parse
from iris_fast.config import PRESETS, TrainConfig, to_yaml
from iris_fast.run.curves import Curve, Point, moving_mean
from iris_fast.run.evaluation import Evaluation, compare, read_evaluations
from iris_fast.run.folder import RunFolder
from iris_fast.run.provenance import command
from iris_fast.run.report import TEMPLATES, write_report
from iris_fast.run.samples import read_samples
from iris_fast.train import train


class Page(html.parser.HTMLParser):
    """Tags of a page with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))

    handle_startendtag = handle_starttag


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run whose name has special characters. Read-only."""
    folder = tmp_path_factory.mktemp("report") / 'a <b> & "c"'
    settings = {"max_steps": 4, "sample_steps": 1, "num_sample_prompts": 2}
    held_out = {"eval_prompts": str(folder.parent / "held_out.txt"), "eval_steps": 2}
    Path(held_out["eval_prompts"]).write_text("a red cube\na <b> ball\n")
    settings |= {"metric_funcs": ["diversity"], "image_token_num_per_image": 16, **held_out}
    train(quick(folder, **settings))
    return folder


@pytest.fixture(scope="module")
def report(finished) -> Page:
    return Page((finished / "report.html").read_text())


def test_the_report_loads_nothing_from_elsewhere(report):
    for tag, attributes in report.tags:
        for name in ("src", "href", "data", "srcset", "poster", "action"):
            value = attributes.get(name) or ""
            assert not value or value.startswith(("data:", "#")), (tag, value)
        assert "url(" not in (attributes.get("style") or "")
        assert tag not in ("link", "iframe", "object")


def test_images_and_curves_of_the_report_are_described(report):
    images = [attributes for tag, attributes in report.tags if tag == "img"]
    prompts = [tag["data-prompt"] for _, tag in report.tags if "data-prompt" in tag]
    assert len(prompts) == 2
    assert [image["alt"] for image in images] == [
        f"{when} (step {step}), image {n} of 4: {prompt}"
        for prompt in prompts
        for when, step in (("Before", 0), ("During", 2), ("After", 4))
        for n in (1, 2, 3, 4)
    ]
    curves = [attributes for tag, attributes in report.tags if tag == "svg"]
    assert len(curves) >= 6
    for drawn in curves:
        assert drawn["role"] == "img"
        first = 0 if drawn["aria-label"].startswith("Held-out") else 1
        assert f"at step {first}" in drawn["aria-label"]
        assert "at step 4" in drawn["aria-label"]
    assert ("html", {"lang": "en"}) in report.tags


def test_special_characters_are_escaped_in_the_report(report):
    assert not [tag for tag, _ in report.tags if tag == "b"]


def test_the_report_shows_the_metrics_before_and_after(finished):
    page = (finished / "report.html").read_text()
    for step in (0, 2, 4):
        for value in read_samples(finished / f"samples/step_{step:05d}.png").means().values():
            assert f"<td>{value:.3f}</td>" in page


def test_the_report_begins_with_the_held_out_prompts(finished):
    page = (finished / "report.html").read_text()
    headings = re.findall("<h2>(.*?)</h2>", page)
    assert headings[:2] == [
        "Held-out prompts, before and after",
        "Does the reward select for the metrics?",
    ]
    assert headings.index("Samples") < headings.index("Curves") < headings.index("The run")
    found = {
        comparison.metric: comparison for comparison in compare(read_evaluations(finished / "eval"))
    }
    assert found.keys() == {"diversity", "image_nsc", "text_nsc"}
    for comparison in found.values():
        for cell in (comparison.before.text(), comparison.after.text(), comparison.verdict):
            assert f">{cell}</td>" in page
        assert f"<td>{comparison.difference.text('+')}</td>" in page
    assert "2 prompts x 4 images" in page
    assert "Held-out prompts: diversity" in page  # a curve: there are three evaluations


BEFORE = [0.0, 0.0, 0.0, 1.0, 1.0, 1.0]  # prompts with means 0, 1/2, 1


@pytest.mark.parametrize(
    ("after", "verdict"),
    [
        ([1.0] * 4 + [1.0, 1.0], "unclear: no clear change (+0.500 ± 0.289)"),
        ([0.0, 1.0, 1.0, 1.0, 1.0, 1.0], "unclear: no clear change (+0.333 ± 0.167)"),
        ([1.0, 0.0, 1.0, 1.0, 1.0, 0.0], "unclear: no clear change (+0.167 ± 0.333)"),
        ([-1.0, -1.0, 0.0, -1.0, 0.0, 0.0], "lower: lower by 1.000 ± 0.000"),
        ([1.0, 1.0, 1.0, 2.0, 2.0, 1.0], "higher: higher by 0.833 ± 0.167"),
    ],
)
def test_the_verdict_in_words_and_colours(here, after, verdict):
    folder = RunFolder(here / "run", resumed=False)
    folder.evaluations.mkdir(parents=True)
    config = quick("run", metric_funcs=["tiny_verifier"])
    folder.config.write_text(to_yaml(config))
    for step, values in ((0, BEFORE), (9, after)):
        found = Evaluation(step, ["a", "b", "c"], 2, {"image_nsc": values, "tiny_verifier": values})
        path = folder.evaluations / f"step_{step:05d}.json"
        path.write_text(json.dumps(asdict(found)))
        write_report(folder)
        page = " ".join(folder.report.read_text().split())
        assert ("there is nothing to compare" in page) == (step == 0)
    colour, _, words = verdict.partition(": ")
    assert f'<p class="verdict {colour}"><strong>Correct (verifier): 0.500 →' in page
    assert f"</strong>, {words}" in page
    assert page.count('class="unclear"') == (1 if colour != "unclear" else 2)  # NSC has no colour


def test_the_report_shows_the_facts_of_the_run(report, finished):
    page = (finished / "report.html").read_text()
    for fact in ("4 steps of 4", "1 × image_nsc + 1 × text_nsc", "commit ", "1 process", "sdpa"):
        assert fact in page
    assert "max_steps: 4" in page  # all of config.yaml


@pytest.mark.parametrize("grids", [0, 1, 2])
def test_a_short_run_has_a_report_too(here, grids):
    folder = RunFolder(here / "run", resumed=False)
    train(quick("run", max_steps=1, sample_steps=min(grids, 1), num_sample_prompts=2))
    if grids == 1:
        (folder.samples / "step_00001.png").unlink()
    if not grids:
        folder.metrics.unlink()
    write_report(folder)
    page = folder.report.read_text()
    assert f"{min(grids, 1)} steps of 1" in page
    assert page.count("<img ") == 2 * 4 * grids
    assert "nan" not in page.lower().split("</style>")[1].split("base64")[0]


def test_grids_of_other_prompts_are_left_out(here):
    settings = {"sample_steps": 1, "metric_funcs": []}
    train(quick("run", max_steps=1, num_sample_prompts=2, **settings))
    train(quick("run", max_steps=3, num_sample_prompts=3, resume_from_checkpoint=True, **settings))
    images = [a["alt"] for tag, a in Page(Path("run/report.html").read_text()).tags if tag == "img"]
    assert len(images) == 2 * 4 * 3
    assert {alt.split(",")[0] for alt in images} == {"Before (step 2)", "After (step 3)"}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"seed": 7, "learning_rate": 2e-5, "cot": False},
        {"reward_funcs": ["image_nsc", "random"], "reward_weights": [-1.0, 0.5]},
        {"prompts": "my prompts.txt", "epsilon_high": 0.3, "metric_funcs": ["richness"]},
        {"preset": "janus-pro-1b", "prompts": "p.txt", "output_dir": "run", "bf16": False},
    ],
)
@pytest.mark.parametrize("processes", [None, "3"])
def test_the_command_of_the_report_gives_the_same_settings(here, changes, processes, monkeypatch):
    if processes:
        monkeypatch.setenv("WORLD_SIZE", processes)
    config = TrainConfig(**PRESETS[changes.get("preset", "tiny")] | changes)
    folder = here / "a run"
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(config))
    words = shlex.split(command(folder))
    assert words[:5] == ["torchrun", "--nproc-per-node", processes or "1", "-m", "iris_fast.train"]
    again = asdict(parse(TrainConfig, "t", words[5:]))
    assert again == asdict(config) | {"output_dir": f"{folder}-again"}


def draw(title: str, points: list[Point], dots: list[Point] = ()) -> str:
    template = TEMPLATES.get_template("curve.html.jinja")
    return template.render(curve=Curve(title, points, dots))


def test_a_curve_by_hand():
    drawn = draw("a < b", [(1, 0.0), (2, 10.0), (3, 5.0)], [(2, 20.0)])
    assert "a &lt; b" in drawn
    assert "0 at step 1, 5 at step 3, between 0 and 10" in drawn
    assert ">20</text>" in drawn  # the dot is inside the axes
    assert 'points="10.0,132.0 170.0,71.0 330.0,101.5"' in drawn
    assert '<circle cx="170.0" cy="10.0"' in drawn
    assert moving_mean([1.0, 2.0, 3.0]) == [1, 2, 3]
    assert moving_mean([0.0, 3.0, 6.0, 0.0]) == [1.5, 3, 3, 3]


def test_a_curve_of_equal_values():
    drawn = draw("flat", [(1, 2.0), (2, 2.0)])
    assert "nan" not in drawn
    assert "2 at step 1, 2 at step 2, between 2 and 2" in drawn


# --- In a browser ---------------------------------------------------------------------------------

# Shows the page in a frame as wide as a phone, and returns measurements as its own title.
PROBE = """
<title></title><iframe id="frame" width="360" height="800" style="border: 0"></iframe><script>
const frame = document.getElementById("frame");
const light = rgb => rgb.map(v => v / 255)
  .map(v => v > .03928 ? ((v + .055) / 1.055) ** 2.4 : v / 12.92)
  .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
const numbers = colour => colour.match(/[\\d.]+/g).map(Number);
function contrast(element) {
  const style = e => frame.contentWindow.getComputedStyle(e);
  const own = numbers(style(element)[element.ownerSVGElement ? "fill" : "color"]).slice(0, 3);
  let behind = element;
  while (behind && numbers(style(behind).backgroundColor)[3] === 0) behind = behind.parentElement;
  const ground = behind ? numbers(style(behind).backgroundColor).slice(0, 3) : [255, 255, 255];
  const [dark, bright] = [light(own), light(ground)].sort((a, b) => a - b);
  return (bright + .05) / (dark + .05);
}
frame.onload = () => {
  const page = frame.contentDocument, box = page.getElementById("filter");
  const texts = [...page.body.querySelectorAll("*")].filter(e =>
    !["SCRIPT", "OPTION"].includes(e.tagName) &&
    [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()));
  const width = page.documentElement.scrollWidth;
  const unlabelled = [...page.querySelectorAll("input")].filter(e => !e.labels.length).length;
  const image = Math.min(...[...page.images].map(e => Math.min(e.clientWidth, e.clientHeight)));
  const visible = () => [...page.querySelectorAll(".prompt")].filter(e => e.offsetHeight).length;
  const counts = [visible()];
  for (const text of [WORDS, "no such prompt", ""]) {
    box.value = text;
    box.dispatchEvent(new Event("input"));
    counts.push(visible());
  }
  document.title = JSON.stringify({width, image, unlabelled, counts, texts: texts.length,
    contrast: Math.min(...texts.map(contrast))});
};
frame.srcdoc = PAGE;
</script>
"""
CHROMIUM = [
    "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip


def chromium(profile: Path, *words: str) -> str:
    return subprocess.run(
        [*CHROMIUM, f"--user-data-dir={profile}", *words],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    ).stdout


@pytest.fixture(scope="module")
def seen(finished, report, tmp_path_factory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("browser")
    prompts = [tag["data-prompt"] for _, tag in report.tags if "data-prompt" in tag]
    page = json.dumps((finished / "report.html").read_text()).replace("</", "<\\/")
    probe = PROBE.replace("PAGE", page).replace("WORDS", json.dumps(prompts[0].upper()))
    (folder / "probe.html").write_text(probe)
    dom = chromium(folder / "profile", "--dump-dom", f"file://{folder}/probe.html")
    return json.loads(dom.partition("<title>")[2].partition("</title>")[0])


@pytest.mark.browser
def test_on_a_phone_nothing_is_wider_than_the_screen(seen):
    assert seen["width"] <= 360
    assert seen["image"] >= 96


@pytest.mark.browser
def test_all_text_has_contrast(seen):
    assert seen["texts"] > 30
    assert seen["contrast"] >= 4.5  # WCAG AA
    assert seen["unlabelled"] == 0


@pytest.mark.browser
def test_the_prompt_filter_hides_the_others(seen):
    assert seen["counts"] == [2, 1, 0, 2]


@pytest.mark.browser
def test_the_report_is_rendered(finished, tmp_path):
    link = tmp_path / "report.html"  # the folder's own name has special characters
    link.symlink_to(finished / "report.html")
    screenshot = tmp_path / "report.png"
    chromium(
        tmp_path / "profile",
        f"--screenshot={screenshot}",
        "--window-size=1280,1600",
        f"file://{link}",
    )
    with Image.open(screenshot) as opened:
        colours = opened.convert("RGB").getcolors(maxcolors=2**24)
    assert len(colours) > 500  # the images
    assert max(colours)[1] == (255, 255, 255)
