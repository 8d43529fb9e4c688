"""Image files to train on."""

from __future__ import annotations

from pathlib import Path

from PIL import Image


def write_photos(folder: Path, count: int) -> Path:
    """Write so many red and so many blue images, each in a folder of its class."""
    for label, color in (("red", (200, 30, 30)), ("blue", (30, 30, 200))):
        (folder / label).mkdir(parents=True)
        for number in range(count):
            Image.new("RGB", (32, 32), (*color[:2], color[2] + number)).save(folder / label / f"{number}.png")
    return folder
