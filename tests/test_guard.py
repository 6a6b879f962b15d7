"""`max_kl` warns or stops; `best_metric` keeps the best checkpoint, whatever interrupts the run."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import run
from small_runs import checkpoints, flags, metrics, quick, tensors, tree

from iris_fast.config import TrainConfig
from iris_fast.errors import UserError
from iris_fast.export import export
from iris_fast.models.pretrained.load import load_janus
from iris_fast.preflight.disk import checkpoints_at_once
from iris_fast.run.best import Judge
from iris_fast.run.checkpoint import newest
from iris_fast.run.manifest import find_fault
from iris_fast.run.trained import open_trained
from iris_fast.train import train

# --- KL -------------------------------------------------------------------------------------------

FAST = {"learning_rate": 3e-3, "max_steps": 6, "beta": 0.01}


def kls(folder: str) -> list[float]:
    return [row["kl"] for row in metrics(folder)]


@pytest.fixture(scope="module")
def unlimited(tmp_path_factory) -> Path:
    """A run whose KL rises above 0 at its second step. Read-only."""
    folder = tmp_path_factory.mktemp("unlimited") / "run"
    train(quick(folder, **FAST))
    found = kls(folder)
    assert found[0] < 1e-6 < found[1]
    return folder


def limit(unlimited: Path, step: int) -> float:
    """A limit that is first exceeded at `step`."""
    found = kls(unlimited)
    below = max(found[: step - 1])
    assert below < found[step - 1], found
    return (below + found[step - 1]) / 2


def test_above_max_kl_the_run_stops_with_a_checkpoint_and_says_why(unlimited, here):
    bound = limit(unlimited, 2)
    words = flags(**FAST, max_kl=bound, sample_steps=50, num_sample_prompts=1, output_dir="run")
    finished = run("iris_fast.train", *words, cwd=here)
    assert (finished.code, finished.err) == (0, "")
    assert checkpoints("run") == ["step_00002"]
    assert kls("run") == kls(unlimited)[:2]
    reason = f"above max_kl {bound:.3g}"
    assert finished.out.count(f"warning: KL to the reference is {kls('run')[1]:.3g}") == 1
    (end,) = (line for line in finished.out.splitlines() if line.startswith("stopped at step 2: "))
    assert reason in end
    assert "raise --max_kl" in finished.out
    assert reason in Path("run/report.html").read_text()
    assert reason in metrics("run")[1]["warnings"]["max kl"]
    assert Path("run/samples/step_00002.png").is_file()  # what the model draws where it stopped


def test_a_stopped_run_stays_stopped_until_the_limit_is_raised(unlimited, here):
    bound = limit(unlimited, 2)
    train(quick("run", **FAST, max_kl=bound))
    before = tree(here)
    train(quick("run", **FAST, max_kl=bound, resume_from_checkpoint=True))
    changed = {name for name, digest in tree(here).items() if before[name] != digest}
    assert changed <= {"run/.launch", "run/config.yaml"}
    train(quick("run", **FAST, max_kl=1e9, resume_from_checkpoint=True))
    assert kls("run") == kls(unlimited)
    left, right = tensors("run", 6), tensors(unlimited, 6)
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_a_warning_about_max_kl_is_printed_once_and_the_run_goes_on(unlimited, here):
    bound = limit(unlimited, 2)
    words = flags(**FAST, max_kl=bound, max_kl_action="warn", output_dir="run")
    finished = run("iris_fast.train", *words, cwd=here)
    assert finished.code == 0
    assert finished.out.count("above max_kl") == 1
    assert kls("run") == kls(unlimited)
    assert "finished at step 6" in finished.out
    warned = ["max kl" in row["warnings"] for row in metrics("run")]
    assert warned == [kl > bound for kl in kls("run")]


def test_ranks_stop_together(unlimited, here):
    words = flags(**FAST, max_kl=1e-5, output_dir="run", per_device_train_batch_size=1)
    finished = run("iris_fast.train", *words, cwd=here, ranks=2)
    assert finished.codes == [0, 0]
    assert "stopped at step 2: " in finished.out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_kl": 0.1, "beta": 0.0}, "max_kl: .*no reference"),
        ({"max_kl": 0.0}, "max_kl: 0.0 .*> 0"),
        ({"max_kl_action": "warn"}, "max_kl_action: warn .*--max_kl"),
        ({"best_metric": "nope"}, "best_metric: nope .*choose from reward, richness, image_nsc"),
        ({"best_metric": "reward", "save_steps": 0}, "best_metric: .*save_steps"),
    ],
)
def test_settings_without_effect_are_refused(changes, message):
    settings = {"metric_funcs": ["richness"], "save_steps": 10, "reward_funcs": ["image_nsc"]}
    with pytest.raises(UserError, match=message):
        quick("run", **settings | changes)


# --- The judge ------------------------------------------------------------------------------------


def rows(values: list[float]) -> list[dict[str, Any]]:
    return [{"step": step, "metrics/m": value} for step, value in enumerate(values, start=1)]


def test_a_checkpoint_is_judged_by_the_steps_around_it():
    """Step t samples with the weights after step t - 1: row 5 measures those after step 4."""
    judge = Judge(rows([0, 0, 0, 1, 2, 3, 0, 0, 0]), "metrics/m", reach=1)
    assert judge.score(4) == pytest.approx((1 + 2 + 3) / 3)
    assert Judge(judge.rows, "metrics/m", reach=0).score(4) == 2
    assert judge.score(9) == 0  # only the row before is there
    assert judge.score(12) is None
    assert Judge(rows([1.0]), "metrics/absent", reach=3).score(1) is None


def test_a_checkpoint_is_decided_when_all_steps_around_it_are_there():
    judge = Judge(rows([0.0] * 7), "metrics/m", reach=2)
    assert [step for step in range(1, 9) if judge.is_decided(step)] == [1, 2, 3, 4]


def test_the_best_has_the_highest_score_and_of_equals_is_the_earliest():
    judge = Judge(rows([0, 5, 0, 7, 0, 7, 0]), "metrics/m", reach=0)
    assert judge.ranked([1, 3, 5, 6, 9]) == [3, 5, 1, 6]  # 9 is not measured


def test_a_score_that_may_still_fall_replaces_no_other():
    """After row 4 the score of step 4 is 0.9, above that of step 2, and in the end 0.4."""
    judge = Judge(rows([0.1, 0.9, 0.8, 0.9]), "metrics/m", reach=1)
    assert judge.ranked([2, 4])[0] == 4
    assert judge.needed([4, 2]) == [2, 4]
    judge.rows.extend(rows([0.1, 0.9, 0.8, 0.9, 0.2, 0.1])[4:])
    assert judge.needed([6, 4, 2]) == [2, 6]


def test_settings_name_the_metric_and_the_window():
    settings = {"best_metric": "m", "metric_funcs": ["m"], "save_steps": 10}
    assert Judge.of(settings, []) == Judge([], "metrics/m", 5)
    assert Judge.of(settings | {"best_metric": "reward"}, []).key == "reward"
    assert Judge.of(settings | {"best_metric": "image_nsc"}, []).key == "rewards/image_nsc"
    assert Judge.of({"best_metric": None, "metric_funcs": []}, []) is None
    assert Judge.of({"metric_funcs": []}, []) is None  # of a run before there was the setting


# --- The best checkpoint --------------------------------------------------------------------------

# The metric of a step is given: it is read from its prompts' place in the run.
SCRIPTED = """
import json
VALUES = {values}
from pathlib import Path
def rated(prompts, images):
    path = Path("{run}/metrics.jsonl")
    step = len(path.read_text().splitlines()) if path.is_file() else 0
    return [VALUES[step]] * len(images)
"""
VALUES = [0.1, 0.9, 0.8, 0.9, 0.2, 0.1, 0.3, 0.2, 0.1, 0.0]  # of rows 1 to 10
BEST = {
    "max_steps": 10, "save_steps": 2, "save_total_limit": 1, "cot": False,
    "metric_funcs": ["rated:rated"], "best_metric": "rated:rated",
}  # fmt: skip
LISTED = BEST | {"metric_funcs": "[rated:rated]"}
KEPT = ["step_00002", "step_00010"]  # step 2: the mean of rows 2, 3 and 4


@pytest.fixture
def rated(here: Path) -> Path:
    (here / "rated.py").write_text(SCRIPTED.format(values=VALUES, run="run"))
    return here


def test_the_best_checkpoint_is_kept_beside_the_newest(rated):
    finished = run("iris_fast.train", *flags(**LISTED, output_dir="run"), cwd=rated)
    assert (finished.code, finished.err) == (0, "")
    assert checkpoints("run") == KEPT
    assert [find_fault(Path("run/checkpoints") / name) for name in KEPT] == [None, None]
    said = "step_00002: rated:rated 0.867 (mean of steps 2 to 4)"
    assert f"best checkpoint: {said}" in finished.out
    assert said in Path("run/report.html").read_text()


def test_without_best_metric_only_the_newest_are_kept(rated):
    changes = {"best_metric": None, "metric_funcs": []}
    train(quick("run", **BEST | changes))
    assert checkpoints("run") == ["step_00010"]
    with pytest.raises(UserError, match="checkpoint: run was trained without --best_metric"):
        open_trained(Path("run"), "best")


def test_the_best_is_the_same_from_several_ranks(rated):
    finished = run("iris_fast.train", *flags(**LISTED, output_dir="run"), cwd=rated, ranks=2)
    assert finished.codes == [0, 0]
    assert checkpoints("run") == KEPT


def test_a_resumed_run_keeps_the_best_of_all_of_its_parts(rated):
    for steps in (3, 5, 10):  # 3 and 5 are saved at their end, and are no multiples of save_steps
        changes = {"max_steps": steps, "resume_from_checkpoint": steps > 3}
        finished = run("iris_fast.train", *flags(**LISTED | changes, output_dir="run"), cwd=rated)
        assert finished.code == 0, finished.err
    assert [row["metrics/rated:rated"] for row in metrics("run")] == pytest.approx(VALUES)
    # Step 3 (rows 3 to 5: 0.8, 0.9, 0.2) is not better than step 2 (rows 2 to 4).
    assert checkpoints("run") == KEPT


def test_a_checkpoint_is_kept_until_the_steps_after_it_are_known(rated):
    """Stopped one step after a checkpoint that only the next steps show to be the best."""
    values = [0.1, 0.1, 0.3, 0.5, 0.2, 0.9, *[0.1] * 6]
    (rated / "rated.py").write_text(SCRIPTED.format(values=values, run="run"))
    changes = {"save_steps": 4, "max_steps": 5}  # steps 4, by rows 3 to 7, and 5, saved at the end
    words = flags(**LISTED | changes, output_dir="run")
    assert run("iris_fast.train", *words, cwd=rated).code == 0
    assert checkpoints("run") == ["step_00004", "step_00005"]
    changes = {"save_steps": 4, "max_steps": 12, "resume_from_checkpoint": True}
    again = flags(**LISTED | changes, output_dir="run")
    assert run("iris_fast.train", *again, cwd=rated).code == 0
    judge = Judge(rows(values), "metrics/m", reach=2)
    assert judge.ranked([4, 5, 8, 12])[0] == 4
    assert checkpoints("run") == ["step_00004", "step_00012"]


# Ends the process, as a power cut would, at the chosen moment of the save at step 6 (where steps
# 2 and 4 exist, and 4 is deleted).
KILLED = """
import os, shutil
from pathlib import Path
from iris_fast.run import checkpoint
from iris_fast.cli import parse_command_line
from iris_fast.config import TrainConfig
MOMENT = {moment!r}
write, delete, rename = checkpoint.write_manifest, shutil.rmtree, Path.rename
def write_or_die(partial, step):
    if step == 6 and MOMENT == "before the manifest":
        os._exit(9)
    write(partial, step)
    if step == 6 and MOMENT == "before the rename":
        os._exit(9)
def rename_or_die(path, target):
    rename(path, target)
    if Path(target).name == "step_00006" and MOMENT == "after the rename":
        os._exit(9)
def delete_or_die(path, **options):
    if Path(path).name == "step_00004":
        if MOMENT == "within a deletion":
            next(Path(path).glob("*.safetensors")).unlink()
        if MOMENT == "after a deletion":
            delete(path)
        if MOMENT != "":
            os._exit(9)
    delete(path, **options)
checkpoint.write_manifest, shutil.rmtree = write_or_die, delete_or_die
Path.rename = rename_or_die
from iris_fast.train import main
main(parse_command_line(TrainConfig, "killed"))
"""
MOMENTS = (
    "before the manifest", "before the rename", "after the rename", "before a deletion",
    "within a deletion", "after a deletion",
)  # fmt: skip


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_kill_while_saving_neither_loses_the_best_nor_takes_another_for_it(rated, moment):
    (rated / "killed.py").write_text(KILLED.format(moment=moment))
    assert run("killed", *flags(**LISTED, output_dir="run"), cwd=rated).code == 9
    folder = Path("run/checkpoints")
    assert find_fault(folder / "step_00002") is None
    assert open_trained(Path("run"), "best")[1] == folder / "step_00002"
    resumes_at = 4 if moment in MOMENTS[:2] else 6
    assert newest(folder)[0] == folder / f"step_{resumes_at:05d}"
    again = flags(**LISTED, output_dir="run", resume_from_checkpoint=True)
    assert run("iris_fast.train", *again, cwd=rated).code == 0
    assert [row["metrics/rated:rated"] for row in metrics("run")] == pytest.approx(VALUES)
    assert checkpoints("run") == KEPT
    assert open_trained(Path("run"), "best")[1] == folder / "step_00002"


def test_a_checkpoint_that_is_being_deleted_is_never_the_best(rated):
    """Its manifest goes first, so that what is left of it is no checkpoint."""
    words = flags(**LISTED, output_dir="run")
    (rated / "killed.py").write_text(KILLED.format(moment="within a deletion"))
    assert run("killed", *words, cwd=rated).code == 9
    left = Path("run/checkpoints/step_00004")
    assert left.is_dir()
    assert find_fault(left) == "manifest.json is missing"


def test_the_run_stops_above_max_kl_and_keeps_the_best(rated, unlimited):
    """The rated steps are high before the KL is."""
    settings = LISTED | FAST | {"max_steps": 10, "max_kl": 1e-5, "save_steps": 1}
    (rated / "rated.py").write_text(SCRIPTED.format(values=[0.0, 1.0, *[0.0] * 9], run="run"))
    finished = run("iris_fast.train", *flags(**settings, output_dir="run"), cwd=rated)
    assert finished.code == 0
    stopped = int(checkpoints("run")[-1].removeprefix("step_"))
    assert f"stopped at step {stopped}: " in finished.out
    assert checkpoints("run")[0] == "step_00001"  # its weights are measured by row 2


# --- Export ---------------------------------------------------------------------------------------


@pytest.fixture
def two_kept(rated: Path) -> Path:
    """A run that kept steps 2 (the best) and 10."""
    assert run("iris_fast.train", *flags(**LISTED, output_dir="run"), cwd=rated).code == 0
    return rated / "run"


def weights(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return {n.removeprefix("policy."): t for n, t in tensors(folder, step).items() if "policy" in n}


def test_export_takes_the_newest_the_best_or_a_step(two_kept, here):
    for name, step in (("newest", 10), ("best", 2), ("step_00002", 2), ("step_00010", 10)):
        finished = run(
            "iris_fast.export", "run", name, "--checkpoint", name, "--dtype", "float32", cwd=here
        )
        assert (finished.code, finished.err) == (0, "")
        assert f"step_{step:05d} written to {name}" in finished.out
        found, expected = load_janus(here / name).model.state_dict(), weights(two_kept, step)
        assert all(torch.equal(found[key], expected[key]) for key in found)


def test_the_default_is_the_newest(two_kept, here):
    export(Path("run"), here / "out", "original", "float32")
    found, expected = load_janus(here / "out").model.state_dict(), weights(two_kept, 10)
    assert all(torch.equal(found[key], expected[key]) for key in found)


def test_a_damaged_best_is_reported_and_the_next_best_is_taken(two_kept, here, capsys):
    shutil.copytree("run/checkpoints/step_00002", "run/checkpoints/step_00003")
    os.truncate(Path("run/checkpoints/step_00002/state.json"), 1)
    assert open_trained(Path("run"), "best")[1].name == "step_00003"
    assert "step_00002 is skipped: state.json has 1 bytes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "step_00004",
            "checkpoint: run/checkpoints/step_00004: manifest.json is missing; .*step_0",
        ),
        ("last", "checkpoint: last is not valid; give newest, best or the name of a folder"),
        ("../step_00002", "checkpoint: ../step_00002 is not valid"),
    ],
)
def test_a_checkpoint_that_is_not_there_is_an_error(two_kept, name, message):
    with pytest.raises(UserError, match=message):
        open_trained(Path("run"), name)


def test_a_best_that_was_never_measured_is_an_error(two_kept):
    Path("run/metrics.jsonl").write_text(json.dumps({"step": 1, "reward": 0.0}) + "\n")
    with pytest.raises(UserError, match=r"run/metrics.jsonl has no metrics/rated:rated"):
        open_trained(Path("run"), "best")


def test_the_disk_has_space_for_the_best_checkpoint_too():
    settings = {"max_steps": 800, "save_steps": 100, "save_total_limit": 2}
    assert checkpoints_at_once(TrainConfig(**settings)) == 3
    assert checkpoints_at_once(TrainConfig(**settings, best_metric="reward")) == 4
