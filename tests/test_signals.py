"""Signals, restarts by torchrun, and the end of the process."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

import pytest
from commands import launch, run, start, wait_for
from small_runs import assert_same_run, checkpoints, flags, metrics, quick, tree

from iris_fast.train import train


def step_count(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


LONG = {"max_steps": 10_000, "save_steps": 0}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_after_a_signal_a_run_saves_and_exits_with_0(prompts, number):
    cwd = Path.cwd()
    running = start("iris_fast.train", *flags(**LONG, prompts=prompts, output_dir="run"), cwd=cwd)
    wait_for(lambda: step_count(cwd / "run") >= 1)
    os.kill(running.processes[0].pid, number)
    finished = running.wait()
    assert finished.code == 0
    assert finished.err == "stopping: a checkpoint is saved at the next opportunity\n"
    steps = len(metrics("run"))
    assert checkpoints("run") == [f"step_{steps:05d}"]
    assert f"stopped by a signal, saved at step {steps}" in finished.out
    assert "--output_dir run --resume_from_checkpoint true" in finished.out
    assert (cwd / "run" / "report.html").exists()
    # Resumed, it equals a run that was never stopped.
    train(
        quick(
            "run", **LONG | {"max_steps": steps + 1}, prompts=prompts, resume_from_checkpoint=True
        )
    )
    train(quick("whole", max_steps=steps + 1, prompts=prompts))
    assert_same_run("whole", "run", steps + 1)


def test_a_run_that_a_signal_stopped_before_its_first_step_can_be_resumed(here, monkeypatch):
    from iris_fast.run import folder as run_folder

    claim = run_folder.claimed

    @contextlib.contextmanager
    def claimed(*arguments):
        with claim(*arguments):
            os.kill(os.getpid(), signal.SIGTERM)
            yield

    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "claimed", claimed)
        train(quick("run"))
    assert checkpoints("run") == []
    train(quick("run", resume_from_checkpoint=True))
    train(quick("whole"))
    assert_same_run("whole", "run", 2)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_torchrun_saves_on_all_ranks(prompts, number):
    """SIGINT as a terminal sends it: to torchrun and to its workers at once."""
    cwd = Path.cwd()
    words = flags(**LONG, prompts=prompts, output_dir="run")
    process = launch("iris_fast.train", *words, cwd=cwd, ranks=2)
    try:
        wait_for(lambda: step_count(cwd / "run") >= 1)
        if number == signal.SIGINT:
            os.killpg(process.pid, number)
        else:
            os.kill(process.pid, number)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    steps = len(metrics("run"))
    assert f"stopped by a signal, saved at step {steps}" in out, err
    assert checkpoints("run") == [f"step_{steps:05d}"]
    words = flags(**LONG | {"max_steps": steps + 1}, prompts=prompts, output_dir="run")
    finished = run("iris_fast.train", *words, "--resume_from_checkpoint", "true", cwd=cwd, ranks=2)
    assert finished.codes == [0, 0]
    assert [row["step"] for row in metrics("run")] == list(range(1, steps + 2))


KILLS_ONCE = """
import os, signal
calls = []
def reward(prompts, images):
    calls.append(1)
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    if first and os.environ["RANK"] == "1" and len(calls) == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return [len(prompt) + i for i, prompt in enumerate(prompts)]
"""


def test_torchrun_resumes_from_the_checkpoint_after_a_rank_was_killed(prompts):
    """Without --output_dir and --resume_from_checkpoint: torchrun repeats the same command."""
    cwd = Path.cwd()
    (cwd / "kills_once.py").write_text(KILLS_ONCE)
    words = flags(prompts=prompts, max_steps=5, save_steps=2, reward_funcs="[kills_once:reward]")
    process = launch("iris_fast.train", *words, cwd=cwd, ranks=2, torchrun=("--max-restarts", "1"))
    try:
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert "finished at step 5" in out
    assert [path.name for path in (cwd / "runs").iterdir()] == ["tiny-001"]
    assert out.count("step 3/5") == 2  # lost with the rank, and repeated
    words = flags(prompts=prompts, max_steps=5, reward_funcs="[kills_once:reward]")
    undisturbed = run(
        "iris_fast.train", *words, "--output_dir", "whole", cwd=cwd, ranks=2,
        TORCHELASTIC_RESTART_COUNT="9",
    )  # fmt: skip
    assert undisturbed.codes == [0, 0]
    assert metrics("whole") == metrics("runs/tiny-001")


def test_a_restart_does_not_use_a_folder_that_was_refused(here):
    """A launch is identified by the parent process, here the one that forks."""
    train(quick("theirs", max_steps=1))
    before = tree(here / "theirs")
    words = flags(max_steps=2, output_dir="theirs")
    for attempt in "01":
        again = run("iris_fast.train", *words, cwd=here, TORCHELASTIC_RESTART_COUNT=attempt)
        assert again.code == 2
        assert "theirs is not empty and is not overwritten" in again.error_line
    assert tree(here / "theirs") == before


def test_a_restart_uses_the_folder_that_was_claimed_before_it(here):
    train(quick("theirs", max_steps=1))
    (here / "runs").mkdir()
    (here / "theirs").rename(here / "runs" / "tiny-001")
    for attempt, steps in (("0", 1), ("1", 2)):
        words = flags(max_steps=steps)  # and no --output_dir
        again = run("iris_fast.train", *words, cwd=here, TORCHELASTIC_RESTART_COUNT=attempt)
        assert (again.code, again.err) == (0, "")
        assert "run folder: runs/tiny-002" in again.out
    assert len(metrics("runs/tiny-001")) == 1
    assert len(metrics("runs/tiny-002")) == 2
    anew = run("iris_fast.train", *flags(max_steps=1), cwd=here)
    assert "run folder: runs/tiny-003" in anew.out


LEAVES_A_THREAD = """
import atexit, threading
threading.Thread(target=threading.Event().wait).start()
atexit.register(lambda: open("handler", "w").close())
def reward(prompts, images):
    return list(range(len(prompts)))
"""


def test_the_process_ends_with_the_run_although_threads_are_left(here):
    """gloo leaves threads. Output is flushed, and exit handlers of libraries run."""
    (here / "leaves_a_thread.py").write_text(LEAVES_A_THREAD)
    words = flags(max_steps=1, reward_funcs="[leaves_a_thread:reward]", output_dir="run")
    process = launch("iris_fast.train", *words, cwd=here)
    try:
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, err) == (0, "")
    assert "finished at step 1" in out
    assert (here / "handler").exists()


def test_a_run_continues_when_its_standard_output_is_closed(here):
    process = launch("iris_fast.train", *flags(max_steps=3, output_dir="run"), cwd=here)
    process.stdout.close()
    assert process.wait(120) == 0
    with process.stderr as err:
        assert "standard output was closed; the run continues, see run/metrics.jsonl" in err.read()
    assert len(metrics("run")) == 3
    assert checkpoints("run") == ["step_00003"]
    assert (here / "run" / "report.html").exists()
