"""The command: which benchmarks it finds, which failures it survives, what it writes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bench import run
from bench.harness import results

ROOT = Path(__file__).parent.parent.parent
HEAD = {"device", "threads", "torch", "triton", "driver", "commit", "date"}

GOOD = """
SUITE = "kernels"
def rows(bench):
    yield {"suite": SUITE, "case": "good", "shape": {}, "dtype": None, "metric": "m", "value": 1.0,
           "unit": "us", "floor": bench.copy_bytes_per_second, "fraction_of_floor": None,
           "fraction_of_copy": None, "peak_memory_bytes": None, "peers": {}}
def profiles(bench):
    bench.profile("kernels/good", lambda: None)
"""
PROFILER_DIES = """
import os
SUITE = "kernels"
def rows(bench):
    yield {"suite": SUITE, "case": "before", "shape": {}, "dtype": None, "metric": "m",
           "value": 2.0, "unit": "us", "floor": None, "fraction_of_floor": None,
           "fraction_of_copy": None, "peak_memory_bytes": None, "peers": {}}
def profiles(bench):
    os._exit(8)
"""
RAISES = """
SUITE = "kernels"
def cases(device):
    raise RuntimeError("no cases today")
"""
DIES = """
import os
SUITE = "kernels"
def rows(bench):
    os._exit(7)
"""
OTHER = """
SUITE = "training"
def rows(bench):
    raise RuntimeError("not asked for")
"""


def test_benchmarks_are_found_by_what_they_define(tmp_path):
    for name, text in {
        "harness/ceilings": 'SUITE = "ceilings"\ndef rows(bench): ...\n',
        "trainer/alpha": 'SUITE = "step"\ndef rows(bench): ...\ndef profiles(bench): ...\n',
        "kernels/beta": 'SUITE = "kernels"\ndef cases(device): ...\n',
        "kernels/tool": "def main(): ...\n",
        "harness/shared": 'SUITE = "kernels"\ndef cases(device): ...\n',
        "top": 'SUITE = "kernels"\ndef cases(device): ...\n',
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.py").write_text(text)
    found = run.benchmarks(tmp_path)
    assert found == {
        "ceilings": ("bench.harness.ceilings", "ceilings", False),
        "alpha": ("bench.trainer.alpha", "step", True),
        "beta": ("bench.kernels.beta", "kernels", False),
    }
    assert list(found) == ["ceilings", "alpha", "beta"]


def test_every_op_of_the_package_has_a_benchmark():
    files = {path.stem for path in (ROOT / "kernels" / "iris_kernels").glob("[!_]*")}
    needs_ranks = {"vocab_parallel"}  # on one rank it is token_stats
    assert files - needs_ranks - {"integrations", "cpp"} <= set(run.benchmarks())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of a good benchmark, one that raises, one whose process dies, one of another suite."""
    root = tmp_path_factory.mktemp("tree")
    kernels = root / "bench" / "kernels"
    kernels.mkdir(parents=True)
    (kernels / "__init__.py").touch()
    for name in ("__init__.py", "run.py"):
        shutil.copy(ROOT / "bench" / name, root / "bench")
    shutil.copytree(ROOT / "bench" / "harness", root / "bench" / "harness")
    for name, text in {
        "good": GOOD, "a_raises": RAISES, "b_dies": DIES, "other": OTHER,
        "c_profiler_dies": PROFILER_DIES,
    }.items():  # fmt: skip
        (kernels / f"{name}.py").write_text(text)
    for name, usual, short in (
        ("clock", "CPU_SECONDS = 0.3, 3.0", "CPU_SECONDS = 0.3, 0.01"),
        ("ceilings", "256 << 20", "1 << 20"),
    ):
        path = root / "bench" / "harness" / f"{name}.py"
        text = path.read_text()
        assert usual in text
        path.write_text(text.replace(usual, short))
    out = root / "new" / "result.json"
    done = subprocess.run(
        [sys.executable, "-m", "bench.run", "--suite", "kernels", "--out", str(out),
         "--commit", "0123abc"],
        cwd=root, capture_output=True, text=True, check=False, timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return done, json.loads(out.read_text())


def test_the_head_names_the_machine_and_the_software(finished):
    head = finished[1]["head"]
    assert set(head) >= HEAD
    assert head["commit"] == "0123abc"
    assert isinstance(head["absent"], list)


def test_a_failure_is_a_row_and_the_rest_still_runs(finished):
    done, document = finished
    rows = {row["case"]: row for row in document["rows"]}
    assert "RuntimeError: no cases today" in rows["a_raises"]["error"]
    assert "status 7" in rows["b_dies"]["error"]
    assert rows["good"]["value"] == 1.0
    assert "other" not in rows
    assert done.returncode == 1, done.stderr


def test_profiles_are_kept_next_to_the_rows(finished):
    assert set(finished[1]["profiles"]) == {"kernels/good"}
    assert finished[1]["profiles"]["kernels/good"]["idle_share"] is None


def test_a_profiler_that_dies_loses_no_row(finished):
    rows = {row["case"]: row for row in finished[1]["rows"]}
    assert rows["before"]["value"] == 2.0
    assert "status 8" in rows["c_profiler_dies"]["error"]


def test_the_ceilings_of_the_machine_reach_the_benchmarks(finished):
    rows = {row["case"]: row for row in finished[1]["rows"]}
    assert finished[1]["rows"][0]["case"] == "copy"
    assert rows["copy"]["unit"] == "GB/s" and rows["matmul"]["unit"] == "TFLOP/s"
    assert rows["good"]["floor"] == pytest.approx(rows["copy"]["value"] * 1e9)


def test_a_row_is_added_whole_or_not_at_all(tmp_path):
    out = tmp_path / "r.json"
    results.write(out, {"head": {}, "rows": []})
    results.append(out, {"case": "first"})
    results.add_profiles(out, {"kernels/a": {"wall_ms": 1.0}})
    results.add_profiles(out, {"kernels/b": {"wall_ms": 2.0}})
    with pytest.raises(ValueError, match="JSON compliant"):
        results.append(out, {"case": "second", "value": float("nan")})
    assert [row["case"] for row in results.read(out)["rows"]] == ["first"]
    assert list(results.read(out)["profiles"]) == ["kernels/a", "kernels/b"]
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]


def test_append_needs_the_same_machine_and_code(tmp_path, monkeypatch):
    out = tmp_path / "r.json"
    here = {key: key for key in (*HEAD, "absent")}
    monkeypatch.setattr(run, "head", lambda commit: here)
    found = {
        "ceilings": run.Benchmark("bench.harness.ceilings", "ceilings", False),
        "a": run.Benchmark("bench.kernels.a", "kernels", False),
    }
    monkeypatch.setattr(run, "benchmarks", lambda: dict(found))

    def run_one(stem, suite, path):
        results.append(path, {"case": stem})
        return 0

    monkeypatch.setattr(run, "_run_in_process", run_one)

    def cases(*flags):
        monkeypatch.setattr("sys.argv", ["run", "--out", str(out), *flags])
        assert run.main() == 0
        return [row["case"] for row in results.read(out)["rows"]]

    assert cases() == ["ceilings", "a"]
    assert cases("--append") == ["ceilings", "a", "ceilings", "a"]
    here = here | {"date": "later"}
    assert len(cases("--append")) == 6
    here = here | {"commit": "another"}
    with pytest.raises(SystemExit, match="commit commit, this run has another"):
        cases("--append")
    assert cases() == ["ceilings", "a"]


def test_bench_finds_kernels_that_are_not_installed(tmp_path):
    """`-S` hides installed packages, including torch, which is not needed for this."""
    program = "import bench, importlib.util as u; print(u.find_spec('iris_kernels').origin)"
    done = subprocess.run(
        [sys.executable, "-S", "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert Path(done.stdout.strip()) == ROOT / "kernels" / "iris_kernels" / "__init__.py"
