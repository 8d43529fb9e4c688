"""What a user's own file or folder holds, in short: results on other contents are other results."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path


@cache
def digest(path: Path) -> str:
    """A short name for the contents of a file, or of all files of a folder and their names in it."""
    found = hashlib.sha256()
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    for file in files:
        if file != path:
            found.update(file.relative_to(path).as_posix().encode())
        found.update(hashlib.sha256(file.read_bytes()).digest())
    return found.hexdigest()[:16]
