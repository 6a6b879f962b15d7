"""The JSON files under bench/results/: reading, appending, writing. Does not import torch."""

import json
import sys
from pathlib import Path
from typing import Any

from bench.harness.rows import Row
from iris_fast.errors import atomic_write

Run = dict[str, Any]  # one file: "head", "rows" and, where calls were profiled, "profiles"


def read(path: Path) -> Run:
    return json.loads(path.read_text(encoding="utf-8"))


def write(path: Path, run: Run) -> None:
    """Write the file in one step, so that no reader sees half of it."""
    text = json.dumps(run, indent=1, allow_nan=False) + "\n"
    with atomic_write("out", path) as partial:
        partial.write_text(text, encoding="utf-8")


def append(path: Path, row: Row) -> None:
    run = read(path)
    run["rows"].append(row)
    write(path, run)


def add_profiles(path: Path, profiles: dict[str, Any]) -> None:
    run = read(path)
    run.setdefault("profiles", {}).update(profiles)
    write(path, run)


def load_all(folder: Path) -> dict[str, Run]:
    """File stem -> run, newest first; other files, such as the compile gates', are left out."""
    files = {path.stem: read(path) for path in folder.glob("*.json")}
    runs = {stem: run for stem, run in files.items() if "rows" in run}
    return dict(sorted(runs.items(), key=lambda item: item[1]["head"]["date"], reverse=True))


# What the heads of one run's pieces agree in.
SAME = ("device", "threads", "busy", "torch", "triton", "driver", "commit")


def merge(runs: dict[str, Run]) -> dict[str, Run]:
    """The pieces of a run, of the same machine and the same code, as one under the newest's name.

    Rows and profiles are in the order in which they were measured; what a later piece measured
    again replaces what an earlier one did.
    """
    groups: dict[tuple, dict[str, Run]] = {}
    for stem, run in runs.items():
        key = tuple(run["head"].get(name) for name in SAME)
        groups.setdefault(key, {})[stem] = run
    merged = {}
    for group in groups.values():
        newest, pieces = next(iter(group)), list(group.values())[::-1]
        rows: dict[str, Row] = {}
        for row in (row for piece in pieces for row in piece["rows"]):
            what = [row.get(k) for k in ("suite", "case", "shape", "dtype", "metric")]
            rows[json.dumps(what, sort_keys=True)] = row
        profiles = {k: v for piece in pieces for k, v in piece.get("profiles", {}).items()}
        merged[newest] = {"head": group[newest]["head"], "rows": list(rows.values())}
        merged[newest] |= {"profiles": profiles} if profiles else {}
    return merged


def check_same(before: dict[str, Any], now: dict[str, Any], out: Path) -> None:
    """Exit with a message unless both heads are of the same machine and the same code."""
    for key in SAME:
        if before.get(key) != now.get(key):
            sys.exit(
                f"--append: {out} was written with {key} {before.get(key)}, this run has "
                f"{now.get(key)}; "
                "write to another --out"
            )
