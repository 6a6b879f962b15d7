"""The rendered pages, tables and plots; the committed ones match the committed JSON."""

import json
import shutil
from pathlib import Path

import pytest

from bench import report
from bench.harness import plots
from bench.harness.results import load_all, merge, write

ROOT = Path(__file__).parent.parent.parent
PAGE = f"# Title\n\n{report.BEGIN}\nold\n{report.END}\n\nlast line\n"


def make_row(R=64, V=16384, value=50.0, **changes):
    return {
        "suite": "kernels", "case": "op", "shape": {"R": R, "V": V}, "dtype": "bfloat16",
        "metric": "forward", "value": value, "unit": "us", "floor": 40.0,
        "fraction_of_floor": 40.0 / value, "fraction_of_copy": 40.0 / value,
        "peak_memory_bytes": 2 << 20,
        "peers": {"eager": {"value": 4 * value, "unit": "us", "peak_memory_bytes": 6 << 20}},
    } | changes  # fmt: skip


def make_run(rows, driver="580", date="2026-01-02T00:00:00+00:00", device="NVIDIA H200"):
    head = {"device": device, "torch": "2", "triton": "3", "driver": driver, "commit": "c",
            "threads": 2, "date": date, "absent": ["xformers"]}  # fmt: skip
    return {"head": head, "rows": rows}


def render(root, **runs):
    (root / "bench" / "results").mkdir(parents=True, exist_ok=True)
    (root / "docs").mkdir(exist_ok=True)
    (root / "docs" / "benchmarks.md").write_text(PAGE)
    for stem, run in runs.items():
        write(root / "bench" / "results" / f"{stem}.json", run)
    pytest.importorskip("matplotlib", reason="matplotlib is in the extra [bench]")


def test_both_pages_show_time_floor_memory_and_peers(tmp_path, monkeypatch):
    rows = [make_row(), make_row(R=128, value=100.0)]
    render(tmp_path, gpu=make_run(rows))
    monkeypatch.setattr("sys.argv", ["report", "--root", str(tmp_path)])
    assert report.main() == 0
    results = (tmp_path / "bench" / "RESULTS.md").read_text()
    assert "| op forward | R=64 V=16384 bfloat16 | 50 us | 40 | 80% | 80% | 2 |" in results
    assert "200 us (4x), 6 MiB" in results
    assert "absent: xformers" in results
    page = (tmp_path / "docs" / "benchmarks.md").read_text()
    assert "| op forward | R=64 V=16384 bfloat16 | 50 us | 80% | 2 | 4x (3x MiB) |" in page
    assert page.startswith("# Title") and page.endswith("last line\n")
    assert "old" not in page
    plot = (tmp_path / "bench" / "plots" / "gpu-time.svg").read_text()
    assert "<svg" in plot
    assert "plots/gpu-time.svg" in results
    report.main()
    assert (tmp_path / "docs" / "benchmarks.md").read_text() == page
    assert (tmp_path / "bench" / "plots" / "gpu-time.svg").read_text() == plot


def test_errors_are_shown(tmp_path):
    broken = make_row(value=1.0)
    broken |= {"value": None, "fraction_of_floor": None, "fraction_of_copy": None, "error": "boom"}
    broken["peers"] = {"eager": {"value": None, "unit": "us", "peak_memory_bytes": None,
                                 "error": "out of memory"}}  # fmt: skip
    page = report.results_page({"gpu": make_run([broken])}, {})
    assert "| failed |" in page
    assert "op forward R=64 V=16384, ours: `boom`" in page
    assert "op forward R=64 V=16384, eager: `out of memory`" in page


def test_a_profile_is_below_the_table_of_its_suite():
    kernel = {"name": "gemm<a|b>", "calls": 24, "ms": 12.5, "share": 0.625}
    run = make_run([make_row(), make_row(suite="step")])
    run["profiles"] = {"step/1B": {"wall_ms": 40.0, "idle_share": 0.25, "longest": [kernel]}}
    page = report.results_page({"gpu": run}, {})
    below = page.split("### step")[1]
    assert "#### 1B" in below
    assert "idle for 25% of 40 ms" in below
    assert r"| `gemm<a\|b>` | 12.5 | 24 | 62.5% |" in below
    run["profiles"]["step/1B"]["idle_share"] = None
    assert "not applicable on a CPU" in report.results_page({"cpu": run}, {})


def test_the_summary_shows_the_newest_gpu_run():
    cpu = make_run([make_row(value=999.0)], None, "2026-03-01T00:00:00+00:00", "some CPU")
    old = make_run([make_row(value=70.0)], date="2026-01-01T00:00:00+00:00")
    new = make_run([make_row(value=60.0)], date="2026-02-01T00:00:00+00:00")
    assert "60 us" in report.summary({"cpu": cpu, "new": new, "old": old})
    assert "999 us" in report.summary({"cpu": cpu})
    one = make_run([make_row(value=888.0)], None, "2026-04-01T00:00:00+00:00", "some CPU")
    one["head"]["threads"] = 1
    assert "999 us" in report.summary({"one": one, "cpu": cpu})
    assert len(merge({"one": one, "cpu": cpu})) == 2


def hours_row(value):
    size = {"model": "1B", "P": 8, "G": 8, "cot": 128, "tokens": 576}
    peer = {"value": 20 * value, "unit": "h", "peak_memory_bytes": None}
    return make_row(value=value) | {
        "suite": "step", "case": "GRPO", "metric": "hours_for_800_steps", "unit": "h",
        "shape": size, "peers": {"T2I-R1's step": peer},
    }  # fmt: skip


def test_hours_of_the_papers_training_are_reported_from_a_gpu_only():
    gpu = make_run([make_row(), hours_row(0.75)])
    cpu = make_run([hours_row(0.01)], None, "2026-03-01T00:00:00+00:00", "some CPU")
    without = make_run([make_row()], date="2026-04-01T00:00:00+00:00")
    for runs in ({"gpu": gpu}, {"cpu": cpu, "gpu": gpu}, {"newer": without, "gpu": gpu}):
        text = report.summary(runs)
        assert "800 steps take 0.75 hours on one NVIDIA H200, 15 with T2I-R1's step:" in text
        assert "hours_for_800_steps" not in text
    assert "800 steps" not in report.summary({"cpu": cpu})
    failed = make_run([hours_row(0.75) | {"value": None}])
    assert "800 steps" not in report.summary({"gpu": failed})


def test_images_per_second_are_plotted_over_the_batch(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is in the extra [bench]")

    def row(sequences, value):
        shape = {"model": "1B", "sequences": sequences, "cot": 0, "tokens": 576}
        return make_row(value=value, suite="rollout", metric="images", unit="images/s", shape=shape)

    assert plots.draw("gpu", make_run([row(16, 10.0)]), tmp_path) == []  # one point is no line
    run = make_run([row(16, 10.0), row(64, 25.0)])
    assert plots.draw("gpu", run, tmp_path) == ["gpu-images.svg"]
    plot = (tmp_path / "gpu-images.svg").read_text()
    for label in ("ours", "eager", plots.FLOOR, "images, images/s"):
        assert f"<!-- {label} -->" in plot, label


def test_a_page_without_markers_is_rejected():
    with pytest.raises(ValueError, match="benchmark table"):
        report.with_table("nothing here", "text")


@pytest.mark.skipif(
    not (ROOT / "bench" / "results").is_dir(), reason="no results have been committed yet"
)
def test_the_committed_pages_match_the_committed_json(tmp_path, monkeypatch):
    """Run `python -m bench.report` after adding a result."""
    pytest.importorskip("matplotlib", reason="matplotlib is in the extra [bench]")
    shutil.copytree(ROOT / "bench" / "results", tmp_path / "bench" / "results")
    (tmp_path / "docs").mkdir()
    shutil.copy(ROOT / "docs" / "benchmarks.md", tmp_path / "docs")
    monkeypatch.setattr("sys.argv", ["report", "--root", str(tmp_path)])
    assert report.main() == 0
    for name in ("docs/benchmarks.md", "bench/RESULTS.md"):
        assert (tmp_path / name).read_text() == (ROOT / name).read_text(), name
    rendered = {p.name for p in (tmp_path / "bench" / "plots").glob("*.svg")}
    assert rendered <= {p.name for p in (ROOT / "bench" / "plots").glob("*.svg")}


def test_compiled_kernels_are_a_section_and_not_a_run(tmp_path):
    model = {"issue_us": 2.0, "memory_us": 4.0, "in_loops": 10.25, "outside_loops": 300}
    gate = {"case": "op V=8", "registers": 56, "model": model | {"per_element": 12.0}}
    document = {"head": {"triton": "3.6.0"}, "gates": [gate, gate | {"model": None}]}
    (tmp_path / report.GATES).write_text(json.dumps(document))
    assert load_all(tmp_path) == {}
    section = report.gates_section(tmp_path / report.GATES)
    assert "triton 3.6.0" in section
    assert section.count("| op V=8 | 56 | 10.2 | 300 | 12.0 | 2 | 4 | 0.50 |") == 1
    assert report.gates_section(tmp_path / "none.json") == ""
