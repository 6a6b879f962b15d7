"""The manifest of a checkpoint folder: size and SHA-256 of every file, written last."""

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

MANIFEST = "manifest.json"
HASH_THREADS = 8  # hashlib releases the GIL


def write_manifest(folder: Path, step: int) -> None:
    """Hash every file of `folder`, write the manifest, and flush all of it to the disk."""
    paths = sorted(folder.iterdir())
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": digest}
        for path, digest in zip(paths, _sha256(paths), strict=True)
    }
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"step": step, "files": files}, indent=1))
    for path in [*paths, manifest, folder]:
        fsync(path)


def find_fault(folder: Path) -> str | None:
    """Compare a checkpoint with its manifest: what is wrong with it, or None."""
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return f"{MANIFEST} is missing"
    try:
        files = json.loads(manifest.read_text())["files"]
        expected = {folder / name: (file["bytes"], file["sha256"]) for name, file in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is damaged"
    for path, (size, _) in expected.items():
        if not path.is_file():
            return f"{path.name} is missing"
        if path.stat().st_size != size:
            return f"{path.name} has {path.stat().st_size} bytes instead of {size}"
    found = _sha256(list(expected))
    for (path, (_, digest)), actual in zip(expected.items(), found, strict=True):
        if actual != digest:
            return f"{path.name} has changed since it was written"
    return None


def fsync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(paths: list[Path]) -> list[str]:
    def digest(path: Path) -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor(HASH_THREADS) as threads:
        return list(threads.map(digest, paths))
