"""A digest of a user's file or folder, so that results on different contents have different keys."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

from visadapt.reading import sha256_of


@cache
def digest(path: Path) -> str:
    """Hash the contents of a file, or the contents and relative names of all files in a folder."""
    sha = hashlib.sha256()
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    for file in files:
        if file != path:
            sha.update(file.relative_to(path).as_posix().encode())
        sha.update(sha256_of(file))
    return sha.hexdigest()[:16]
