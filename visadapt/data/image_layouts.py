"""Find labelled images: folders of classes, with or without splits, and tables of file names.

torchvision's ``ImageFolder`` is not used. It lists the classes of one folder and knows nothing of splits, hidden or
linked files or classes that a task already has; it drops files of other suffixes, among them HEIC and AVIF, without a
word; and it takes a folder of splits for classes. All that would be left of it is ``os.scandir``.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from visadapt.data.bounded import is_image
from visadapt.data.datasets_library import SPLITS, is_stored
from visadapt.data.image_file import SUFFIXES
from visadapt.data.lazy_images import ImageFiles
from visadapt.data.splits import numbers_of, relabelled
from visadapt.data.tables import ARCHIVES, OTHERWISE, is_table
from visadapt.data.targets import doubtful, held_out
from visadapt.errors import VisadaptError, nearest
from visadapt.reading import check_file

LAYOUTS = (
    "CLASS/image.jpg, or train/CLASS/image.jpg with test/ and val/ beside train/, "
    "or a table with the columns 'file' and 'label'"
)
"""The layouts that are understood, for messages."""

# not images, and no one means them to be
_OTHER = frozenset((
    ".bin", ".csv", ".db", ".doc", ".docx", ".html", ".ini", ".json", ".jsonl", ".log", ".md", ".npy", ".npz",
    ".parquet", ".pdf", ".pkl", ".pt", ".py", ".safetensors", ".tsv", ".txt", ".xml", ".yaml", ".yml",
))  # fmt: skip


_USUAL = ("JPEG", "PNG", "GIF", "WEBP")
"""Formats of images that are found under any name: their first bytes are not those of a text."""


@dataclass(frozen=True, eq=False)
class Found:
    """Labelled images, before they are read.

    Args:
        name: of the data set.
        classes: names of the labels; empty for real values.
        splits: the images of ``train``, ``validation`` and ``test``.
        remarks: what the library decided, for the user to know.
    """

    name: str
    classes: tuple[str, ...]
    splits: dict[str, ImageFiles]
    remarks: tuple[str, ...] = ()

    def renumbered(self, labels: Sequence[str]) -> Found:
        """Number the classes as a task numbers its labels.

        Raises:
            VisadaptError: a class is not one of the task's labels.
        """
        numbers = numbers_of(self.classes, labels, self.name)
        splits = {
            split: replace(files, labels=relabelled(files.labels, numbers, len(labels)))
            for split, files in self.splits.items()
        }
        return replace(self, classes=tuple(labels), splits=splits)

    def completed(self, seed: int, *, whole: bool = False, validation: bool = True) -> Found:
        """Return the data with the splits that it lacks.

        Args:
            seed: of the splits that are made.
            whole: whether all images are to be tested: no split is made.
            validation: whether a validation split is made.

        Raises:
            VisadaptError: there are too few images to split.
        """
        splits, remarks = dict(self.splits), list(self.remarks)
        if whole:
            last = next(split for split in ("test", "validation", "train") if split in splits)
            return replace(self, splits={**{k: v for k, v in splits.items() if k != last}, "test": splits[last]})
        if "train" not in splits:
            raise VisadaptError(f"{self.name} has no training images; the layouts are: {LAYOUTS}")
        if "test" not in splits and "validation" in splits:
            splits["test"] = splits.pop("validation")
        for split, share in (("test", 5), ("validation", 10)):
            if split in splits or (split == "validation" and not validation):
                continue
            whole_train = splits["train"]
            if len(whole_train) < 4:
                raise VisadaptError(
                    f"{whole_train.name} must have at least 4 images to hold out some for {split}, "
                    f"got {len(whole_train)}"
                )
            rest, chosen = held_out(whole_train.labels, max(1, len(whole_train) // share), seed)
            splits["train"] = replace(whole_train.subset(rest), name=_part(whole_train.name, "train"))
            splits[split] = replace(whole_train.subset(chosen), name=_part(whole_train.name, split))
            if "test" not in self.splits:
                remarks.append(f"{self.name}: {len(chosen)} of {len(whole_train)} images held out for {split}")
        return replace(self, splits=splits, remarks=tuple(remarks))


def _part(name: str, split: str) -> str:
    return f"{name.removesuffix(' (train)')} ({split})"


def layout_of(path: Path) -> Path | dict[str, Path]:
    """Find out how the labelled images of a path are laid out.

    Args:
        path: a folder or a table.

    Returns:
        The table, or the folder of each split; a folder of classes only is the split ``train``.

    Raises:
        VisadaptError: the layout is not one of those that are understood, which are listed.
    """
    if path.suffix.lower() in (".gz", *ARCHIVES) and not is_table(path) and not os.path.isdir(path):
        raise VisadaptError(f"{path} must be unpacked first, to a folder of images: {LAYOUTS}")
    if not os.path.isdir(path):
        check_file(path, "data", "a folder or a table of images")
        if path.suffix.lower() in OTHERWISE:
            raise VisadaptError(f"{path} must be a table as text: save it as .csv")
        if not is_table(path) or not os.path.isfile(path):
            raise VisadaptError(f"{path} must be a folder or a table of images, such as images.csv: {LAYOUTS}")
        return path
    tables = [file for file in _visible(path) if file.is_file() and is_table(file)]
    splits = _split_folders(path)
    if splits:
        return splits
    if any(files_below(folder) for folder in _class_folders(path)) and not (
        len(tables) == 1 and len(_class_folders(path)) == 1
    ):
        return {"train": path}
    if len(tables) == 1:
        return tables[0]
    if tables:
        raise VisadaptError(f"{path} has several tables: give one of {', '.join(file.name for file in tables)}")
    stored = [file for file in _visible(path) if file.is_file() and is_stored(file)]
    if len(stored) == 1:
        return stored[0]
    if other := next((file for file in _visible(path) if file.suffix.lower() in OTHERWISE), None):
        what = "unpacked first" if other.suffix.lower() in ARCHIVES else "a table as text: save it as .csv"
        raise VisadaptError(f"{path} has no folder of images per class, and {other.name} must be {what}")
    loose = len(_images_in(path))
    got = f"{loose} images without labels" if loose else "no images"
    raise VisadaptError(f"{path} must hold labelled images, got {got}; the layouts are: {LAYOUTS}")


def files_below(folder: Path) -> list[Path]:
    """List the image files below a folder, sorted; hidden files and folders are left out.

    A file without the suffix of an image is one if its content is. Linked folders are followed, each folder once.
    """
    files: list[Path] = []
    seen = set(folder.resolve().parents)
    for place, folders, names in os.walk(folder, followlinks=True):
        real = Path(place).resolve()
        if real in seen:
            folders.clear()  # a link to a folder above, whose images are of other classes, or a second link
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not _is_hidden(Path(name)))
        files += [Path(place, name) for name in names if not _is_hidden(Path(name))]
    return _sorted_out(sorted(files))


def _images_in(folder: Path) -> list[Path]:
    return _sorted_out(_visible(folder))


def _sorted_out(paths: Sequence[Path]) -> list[Path]:
    images, others = [], []
    for file in paths:
        suffix = file.suffix.lower()
        if file.is_dir():
            continue
        # a link to nothing is an image that cannot be read
        if suffix in SUFFIXES or is_image(file, _USUAL if suffix in _OTHER else None):
            images.append(file)
        elif suffix not in _OTHER:
            others.append(file)
    if others:
        warnings.warn(f"skipping {len(others)} files that are not images, such as {others[0]}", stacklevel=4)
    return images


def _is_hidden(path: Path) -> bool:
    # .ipynb_checkpoints, ._photo.jpg and __MACOSX belong to other programs
    return path.name.startswith(".") or path.name in ("__MACOSX", "Thumbs.db")


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not _is_hidden(path))


def _class_folders(folder: Path) -> list[Path]:
    return [path for path in _visible(folder) if path.is_dir()]


def _split_folders(path: Path) -> dict[str, Path]:
    """The folders of the splits; empty if those names are classes, whose images lie in them directly."""
    splits: dict[str, Path] = {}
    named = {
        folder: split
        for folder in _class_folders(path)
        for split, names in SPLITS.items()
        if folder.name.lower() in names
    }
    if not named or (len(named) == 1 and "train" not in named.values() and len(_class_folders(path)) > 1):
        return {}
    direct = [folder for folder in named if not _class_folders(folder) and _images_in(folder)]
    if direct and len(_class_folders(path)) > len(named):
        return {}  # classes that happen to have such names, beside others
    if direct:
        raise VisadaptError(f"{direct[0]} must have one folder per class, got images; the layouts are: {LAYOUTS}")
    for folder, split in named.items():
        if split in splits:
            raise VisadaptError(f"{path} has two folders for {split}, {splits[split].name!r} and {folder.name!r}")
        splits[split] = folder
    return splits


def in_folders(path: Path, splits: dict[str, Path], known: Sequence[str] | None) -> Found:
    """Find the images of folders of classes.

    Args:
        path: the folder that was named.
        splits: the folder of each split, with one folder per class.
        known: classes of the task in their order; None for those of the training images.

    Raises:
        VisadaptError: a class has no images or is not one of the task's, or the folders are not laid out so.
    """
    first = splits.get("train") or next(iter(splits.values()))
    names = {split: [p.name for p in _class_folders(folder)] for split, folder in splits.items()}
    own = next(split for split, folder in splits.items() if folder == first)
    if not names[own]:
        raise VisadaptError(f"{first} must have one folder per class, got none; the layouts are: {LAYOUTS}")
    files = {(split, name): files_below(splits[split] / name) for split in splits for name in names[split]}
    empty = next((name for name in names[own] if not files[own, name]), None)
    if inner_split := next((name for name in names[own] if _split_folders(first / name)), None):
        raise VisadaptError(f"{first} is not laid out as {LAYOUTS}: did you mean {first / inner_split}?")
    if empty is not None and known is None:
        raise VisadaptError(f"{first / empty} must have at least one image, got none; the layouts are: {LAYOUTS}")
    inner = _class_folders(first / names[own][0]) if len(splits) == len(names[own]) == 1 else []
    if len(inner) > 1:
        raise VisadaptError(
            f"{first} has one class, {names[own][0]!r}, with {len(inner)} folders in it: did you mean "
            f"{first / names[own][0]}?"
        )
    classes = list(known or names[own])
    lacks = "is not a class of the task" if known is not None else f"is not in {first.name!r}"
    parts = {}
    for split, folder in splits.items():
        for name in names[split]:
            if name not in classes and (files[split, name] or known is None):
                raise VisadaptError(f"{folder}: class {name!r} {lacks}{nearest(name, classes)}")
        items = [(file, number) for number, name in enumerate(classes) for file in files.get((split, name), [])]
        if not items:
            raise VisadaptError(f"{folder} must have at least one image, got none")
        labels = torch.tensor([label for _, label in items])
        parts[split] = ImageFiles([file for file, _ in items], labels, name=str(folder))
    used = set(splits.values())
    if path not in used:
        others = [folder for folder in _class_folders(path) if folder not in used and files_below(folder)]
        if others:
            warnings.warn(f"{path}: the images in {others[0].name!r} are in none of the splits and are not used",
                          stacklevel=3)  # fmt: skip
    if loose := [file for folder in {path, *used} for file in _images_in(folder)]:
        warnings.warn(f"{path}: {len(loose)} images outside the class folders are not used, such as {loose[0]}",
                      stacklevel=3)  # fmt: skip
    alike = () if known is not None else doubtful(classes, path.name)
    return Found(path.name, tuple(classes), parts, alike)
