"""Folders and tables as people have them: each is read right, or refused in one clear line."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from visadapt.data import ImageFiles, load_images, load_text, read_images
from visadapt.data.image_inputs import ImageInputs
from visadapt.data.image_sources import find
from visadapt.data.targets import ordered
from visadapt.errors import VisadaptError, command_line

RED, GREEN = (250, 0, 0), (0, 250, 0)
COLORS = {"cat": RED, "dog": GREEN}


def image(file: Path, color: Any = RED, mode: str = "RGB", size: tuple[int, int] = (12, 10), **options: Any) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(file, **options)
    return file


def classes(folder: Path, count: int = 10, names: tuple[str, ...] = ("cat", "dog"), suffix: str = ".png") -> None:
    for name in names:
        for i in range(count):
            image(folder / name / f"{i}{suffix}", COLORS.get(name, (0, 0, 250)))


def table(file: Path, rows: list[str], header: str = "file,label") -> None:
    file.write_text("\n".join([header, *rows]), encoding="utf-8")


def listed(root: Path, count: int = 10) -> list[str]:
    """Images beside each other, and the rows of their table."""
    rows = []
    for name in ("cat", "dog"):
        for i in range(count):
            image(root / f"{name}{i}.png", COLORS[name])
            rows.append(f"{name}{i}.png,{name}")
    return rows


Build = Callable[[Path], Any]


def splits(*names: str, counts: tuple[int, ...] = (10, 4, 6)) -> Build:
    def build(root: Path) -> None:
        for name, count in zip(names, counts, strict=False):
            classes(root / name, count)

    return build


def both(*builds: Build) -> Build:
    def build(root: Path) -> Any:
        return [one(root) for one in builds][-1]

    return build


def text_file(name: str, content: bytes = b"nothing") -> Build:
    def build(root: Path) -> None:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)

    return build


def tabled(rows: Callable[[list[str]], list[str]] = lambda rows: rows, header: str = "file,label",
           name: str = "images.csv", inside: bool = False) -> Build:  # fmt: skip
    def build(root: Path) -> Path | None:
        table(root / name, rows(listed(root)), header)
        return None if inside else root / name

    return build


def stored(name: str, more: Callable[[int], dict[str, str]] = lambda i: {}) -> Build:
    """A table that the ``datasets`` library reads."""

    def build(root: Path) -> Path:
        datasets = pytest.importorskip("datasets")
        datasets.disable_progress_bars()
        pairs = [row.split(",") for row in listed(root)]
        rows = [{"file_name": file, "label": label, **more(i)} for i, (file, label) in enumerate(pairs)]
        made = datasets.Dataset.from_list(rows)
        made.to_parquet(root / name) if name.endswith("parquet") else made.to_json(root / name)
        return root / name

    return build


GOOD: dict[str, tuple[Build, tuple[int, int, int], dict[str, Any]]] = {
    "flat": (classes, (15, 1, 4), {}),
    "flat, upper-case suffix": (lambda root: classes(root, suffix=".PNG"), (15, 1, 4), {}),
    "flat, jpg and webp": (
        both(lambda r: classes(r, 5, suffix=".jpg"), lambda r: classes(r, 5, suffix=".webp")), (15, 1, 4), {}),
    "flat, nested folders": (
        both(lambda r: classes(r, 5), lambda r: [image(r / "cat" / "more" / f"{i}.png") for i in range(10)]),
        (15, 1, 4), {}),
    "flat, hidden files and folders": (
        both(classes, text_file(".DS_Store"), text_file("cat/._0.png"), text_file(".ipynb_checkpoints/a.png"),
             text_file("__MACOSX/cat/._1.png"), text_file("cat/Thumbs.db")), (15, 1, 4), {}),
    "flat, notes beside": (both(classes, text_file("README.md"), text_file("cat/notes.txt")), (15, 1, 4), {}),
    "flat, no suffix": (
        lambda r: [image(r / n / f"{i}.png", COLORS[n]).rename(r / n / str(i)) for n in COLORS for i in range(10)],
        (15, 1, 4), {}),
    "train and test": (splits("train", "test"), (18, 2, 8), {}),
    "train and val": (splits("train", "val"), (18, 2, 8), {}),
    "train, val and test": (splits("train", "val", "test"), (20, 8, 12), {}),
    "train, valid and test": (splits("train", "valid", "test"), (20, 8, 12), {}),
    "Train, Validation and Test": (splits("Train", "Validation", "Test"), (20, 8, 12), {}),
    "TRAIN and TEST": (splits("TRAIN", "TEST"), (18, 2, 8), {}),
    "training and testing": (splits("training", "testing"), (18, 2, 8), {}),
    "train only": (splits("train"), (15, 1, 4), {}),
    "flat, linked folders": (
        lambda r: [classes(r.parent / "elsewhere"), *((r / n).symlink_to(r.parent / "elsewhere" / n) for n in COLORS)],
        (15, 1, 4), {}),
    "flat, a linked folder in a class": (
        lambda r: [classes(r, 5), *((image(r.parent / "more" / n / f"{i}.png", COLORS[n])) for n in COLORS
                                    for i in range(5)),
                   *((r / n / "more").symlink_to(r.parent / "more" / n) for n in COLORS)], (15, 1, 4), {}),
    "flat, a link to the folder above": (
        lambda r: [classes(r), (r / "cat" / "all").symlink_to(r)], (15, 1, 4), {}),
    "class called train": (
        lambda r: classes(r, 10, ("train", "bus")), (15, 1, 4), {}),
    "class with spaces and accents": (lambda r: classes(r, 10, ("grüne Äpfel", "red pears")), (15, 1, 4), {}),
    "classes of Unicode, numbers and punctuation": (
        lambda root: classes(root, 2, ("日本語", "🐱", "007", "7", "-x", "a,b", '"q"', "C:", "con", "new\nline")),
        (15, 1, 4), {}),
    "an image under the name of a text": (
        both(lambda r: classes(r, 9),
             lambda r: [image(r / n / "9.png", COLORS[n]).rename(r / n / "9.txt") for n in COLORS]), (15, 1, 4), {}),
    "table": (tabled(), (15, 1, 4), {}),
    "table with .tsv": (
        tabled(lambda rows: [r.replace(",", "\t") for r in rows], "file\tlabel", "images.tsv"), (15, 1, 4), {}),
    "table with .CSV": (tabled(name="IMAGES.CSV"), (15, 1, 4), {}),
    "table in the folder": (tabled(inside=True), (15, 1, 4), {}),
    "table with other names": (
        tabled(header="photo,species"), (15, 1, 4), {"image": "photo", "label": "species"}),
    "table by numbers": (
        tabled(lambda rows: rows[1:], "cat0.png,cat"), (15, 1, 4), {"image": "0", "label": "1", "header": False}),
    "table with splits": (
        tabled(lambda rows: [f"{r},{'test' if i % 4 == 0 else 'Train'}" for i, r in enumerate(rows)],
               "file,label,split"), (14, 1, 5), {}),
    "table with semicolons": (
        tabled(lambda rows: [r.replace(",", ";") for r in rows], "file;label"), (15, 1, 4), {"delimiter": ";"}),
    "table with a separator that Excel notes": (
        both(tabled(lambda rows: [r.replace(",", ";") for r in rows], "sep=;\r\nfile;label")), (15, 1, 4), {}),
    "table with quotes after spaces": (
        tabled(lambda rows: ['"{}", "{}"'.format(*r.split(",")) for r in rows]), (15, 1, 4), {}),
    "table with splits, names in capitals": (
        tabled(lambda rows: [f"{r},{'test' if i % 4 == 0 else 'train'}" for i, r in enumerate(rows)],
               "File,Label,Split"), (14, 1, 5), {}),
    "table with folders as on Windows": (
        lambda r: table(r / "images.csv", [f"all\\{row}" for row in listed(r / "all")]), (15, 1, 4), {}),
    "table with absolute names": (
        lambda r: table(r / "images.csv", [f"{r / 'all' / row}" for row in listed(r / "all")]), (15, 1, 4), {}),
    "table with rows of UTF-16": (
        lambda r: [(r / "images.csv").write_text("\n".join(["file,label", *listed(r)]), encoding="utf-16"), None][1],
        (15, 1, 4), {}),
    "table in old line ends": (
        lambda r: [(r / "images.csv").write_text("\r".join(["file,label", *listed(r)]), newline=""), None][1],
        (15, 1, 4), {}),
    "records of files": (stored("images.jsonl"), (15, 1, 4), {}),
    "records of files of a folder": (both(stored("metadata.jsonl"), lambda r: None), (15, 1, 4), {}),
    "records of files with splits": (
        stored("images.ndjson", lambda i: {"split": ("train", "Test")[i % 4 == 0]}), (14, 1, 5), {}),
    "parquet of files": (stored("images.parquet"), (15, 1, 4), {}),
    "table of real values": (
        tabled(lambda rows: [f"{r.split(',')[0]},{i / 7}" for i, r in enumerate(rows)]), (15, 1, 4),
        {"regression": True}),
    "table of several labels": (
        tabled(lambda rows: [f"{r.split(',')[0]},{('a', 'a;b', '', 'c')[i % 4]}" for i, r in enumerate(rows)]),
        (15, 1, 4), {"multi_label": ";"}),
}  # fmt: skip


@pytest.mark.parametrize("case", GOOD)
def test_layout_is_read(tmp_path: Path, case: str) -> None:
    build, counts, options = GOOD[case]
    made = build(tmp_path)
    found = ImageInputs(8).load(str(made if isinstance(made, Path) else tmp_path), **options)
    assert (len(found.train), len(found.validation), len(found.test)) == counts
    if found.classes == ("cat", "dog"):
        for split in (found.train, found.validation, found.test):
            red = split.images[:, 0].float().mean((1, 2)) > 100
            assert torch.equal(red, split.labels == 0), "every image has the label of its folder or row"
    if "regression" in options:
        assert (found.classes, found.train.labels.dtype) == ((), torch.float32)
    if "multi_label" in options:
        assert (found.classes, found.train.labels.dtype) == (("a", "b", "c"), torch.bool)
    made_test = {"train", "test", "Train", "val", "TRAIN", "training"}.isdisjoint(case.replace(",", " ").split()[:1])
    if made_test and "splits" not in case:
        assert any("held out for test" in remark for remark in found.remarks)


BAD: dict[str, tuple[Build, str, dict[str, Any]]] = {
    "nothing": (lambda r: None, "must hold labelled images, got no images; the layouts are: CLASS/image", {}),
    "loose images": (lambda r: [image(r / f"{i}.png") for i in range(5)], "got 5 images without labels", {}),
    "unlabelled splits": (
        lambda r: [image(r / s / f"{i}.png") for s in ("train", "test") for i in range(5)],
        "must have one folder per class, got images; the layouts are", {}),
    "two names of a split": (
        splits("train", "val", "valid"), "two folders for validation, 'val' and 'valid'", {}),
    "one folder too high": (
        lambda r: splits("train", "test")(r / "photos"), "did you mean .*photos", {}),
    "one folder too high, flat": (lambda r: classes(r / "photos"), "did you mean .*photos", {}),
    "empty class": (
        both(classes, lambda r: (r / "emu").mkdir()), "emu must have at least one image, got none", {}),
    "class of the test only": (
        both(splits("train", "test"), lambda r: [image(r / "test" / "doge" / "0.png")]),
        "class 'doge' is not in 'train'; did you mean 'dog'", {}),
    "empty test": (
        both(splits("train"), lambda r: (r / "test" / "cat").mkdir(parents=True)),
        "test must have at least one image", {}),
    "too few": (lambda r: classes(r, 1), "must have at least 4 images to hold out some for test, got 2", {}),
    "two tables": (
        both(tabled(), text_file("more.csv", b"file,label\n"), lambda r: r), "several tables: give one of", {}),
    "missing files": (
        tabled(lambda rows: [*rows, "cat99.png,cat"]), r"1 of 21 images do not exist, such as .*cat99\.png; did", {}),
    "no column of files": (tabled(header="photo,label"), "choose the column of file names with image=", {}),
    "no column of labels": (tabled(header="file,species"), "choose the label column with label=", {}),
    "misspelt column": (
        tabled(header="file,species"), "no column 'specie' in .*; did you mean 'species'", {"label": "specie"}),
    "empty label": (tabled(lambda rows: [*rows, "cat0.png,"]), "row 22: the label is empty", {}),
    "comma in a label": (
        tabled(lambda rows: [*rows, "cat0.png,cat, big"]), "row 22 must have 2 columns, got 3 .*quotation marks", {}),
    "unknown split": (
        tabled(lambda rows: [f"{r},trian" for r in rows], "file,label,split"),
        "no split 'trian'; did you mean 'train'", {}),
    "real values without regression": (
        tabled(lambda rows: [f"{rows[0].split(',')[0]},{i / 7}" for i in range(40)]),
        "40 different numbers as labels, such as 0.0: give regression=", {}),
    "few real values without regression": (
        tabled(lambda rows: [f"{rows[i].split(',')[0]},{i / 7}" for i in range(12)]),
        "12 different numbers as labels, such as 0.0: give regression=", {}),
    "another separator": (
        tabled(lambda rows: [r.replace(",", ";") for r in rows], "file;label"),
        r"has one column, 'file;label' \(delimiter= sets its separator\)", {}),
    "words for real values": (tabled(), "row 2: the label must be a finite number, got 'cat'", {"regression": True}),
    "a class each": (
        tabled(lambda rows: [f"{rows[0].split(',')[0]},c{i}" for i in range(40)]),
        "40 different labels for 40 samples", {}),
    "nothing named": (lambda r: None, "an image data set must have a name, got ''", {"name": ""}),
    "an archive": (
        text_file("photos.zip"), "must be unpacked first, to a folder of images: CLASS/image", {"name": "photos.zip"}),
    "a packed archive": (text_file("a.tar.gz"), "must be unpacked first", {"name": "a.tar.gz"}),
    "a pipe": (lambda r: os.mkfifo(r / "pipe"), "data must be a folder or a table of images, got", {"name": "pipe"}),
    "semicolons and quoted commas": (
        tabled(lambda rows: [f'"{r.split(",")[0]}";"{r.split(",")[1]}, x"' for r in rows], "file;label"),
        r"has one column, 'file;label' \(delimiter= sets its separator\)", {}),
    "file name that is empty": (
        tabled(lambda rows: [*rows, ",cat"]), r"row 22: the file name is empty", {}),
    "a folder instead of a file": (
        both(lambda r: (r / "more").mkdir(), tabled(lambda rows: [*rows, "more,cat"])), r"more, which is a folder", {}),
    "addresses": (
        tabled(lambda rows: [f"https://example.org/{r}" for r in rows]),
        "download the images, and name their files", {}),
    "drives": (
        tabled(lambda rows: [f"C:\\{r}" for r in rows]), "give names without a drive, and root=", {}),
    "names without a suffix": (
        tabled(lambda rows: [r.replace(".png", "") for r in rows]), "a file name must have its suffix", {}),
    "images in the folder beside the table": (
        lambda r: table(r / "images.csv", listed(r / "all")), "give root=, .* such as .*all$", {}),
    "no column names": (
        tabled(lambda rows: rows[1:], "cat0.png,cat"), "first row must hold the column names, got 'cat0.png'", {}),
    "a note above the column names": (
        tabled(header="# by hand\nfile,label"), "first row must hold the column names, got '# by hand'", {}),
    "decimal commas": (
        tabled(lambda rows: [f"{r.split(',')[0]};1,{i}" for i, r in enumerate(rows)], "file;label"),
        "got '1,0': write a decimal comma as a point", {"regression": True, "delimiter": ";"}),
    "lists of labels": (
        tabled(lambda rows: [f"""{r.split(',')[0]},"['a', 'b']\"""" for r in rows]), "leave out the brackets",
        {"multi_label": ","}),
    "a spreadsheet of images": (text_file("a.xlsx"), "must be a table as text: save it as .csv", {"name": "a.xlsx"}),
    "a spreadsheet beside images": (
        both(lambda r: listed(r) and None, text_file("a.xlsx")), "and a.xlsx must be a table as text", {}),
    "classes in archives": (text_file("cat.zip"), "and cat.zip must be unpacked first", {}),
    "annotations of COCO": (
        text_file("coco.json", b'{"images": [{"id": 1}], "annotations": [{"id": 1}], "categories": [{"id": 1}]}'),
        "has the columns 'images', 'annotations', 'categories': choose the column of images or of their files", {}),
    "another composition of letters": (
        both(lambda r: classes(r / "train", 2, ("caf\u00e9", "a")), lambda r: classes(r / "test", 2, ("cafe\u0301",))),
        "has the same letters, composed otherwise", {}),
    "not a table": (
        lambda r: (image(r / "a.png"), r / "a.png")[1], "must be a folder or a table of images", {}),
    "bytes of another encoding": (
        both(text_file("t.csv", "file,label\ncafé.png,a\n".encode("latin-1")), lambda r: r / "t.csv"),
        r"as utf-8-sig text: byte 0xe9 at offset 14, in row 2 .*encoding=", {}),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_layout_is_refused_in_one_line(tmp_path: Path, case: str) -> None:
    build, message, options = BAD[case]
    made = build(tmp_path)
    data = str(made if isinstance(made, Path) else tmp_path)
    if (name := (options := dict(options)).pop("name", None)) is not None:
        data = name and str(tmp_path / name)
    with pytest.raises(VisadaptError, match=message) as caught:
        ImageInputs(8).load(data, **options)
    assert "\n" not in str(caught.value)


def test_whole_folders_are_tested_without_a_split(tmp_path: Path) -> None:
    classes(tmp_path / "flat", 3)
    found = ImageInputs(8).load(str(tmp_path / "flat"), labels=("dog", "cat"), whole=True)
    assert (found.train, found.validation, found.test.labels.tolist()) == (None, None, [0] * 3 + [1] * 3)
    classes(tmp_path / "one" / "test", 3, ("dog",))
    found = ImageInputs(8).load(str(tmp_path / "one"), labels=("cat", "dog"), whole=True)
    assert found.test.labels.tolist() == [1, 1, 1]


def test_images_in_no_split_and_outside_the_classes_are_named(tmp_path: Path) -> None:
    splits("train", "test")(tmp_path)
    image(tmp_path / "unlabelled" / "x.png")
    image(tmp_path / "train" / "loose.png")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ImageInputs(8).load(str(tmp_path))
    said = " ".join(str(warning.message) for warning in caught)
    assert "images in 'unlabelled' are in none of the splits" in said
    assert "1 images outside the class folders are not used" in said


def test_files_that_are_not_images_are_named(tmp_path: Path) -> None:
    classes(tmp_path)
    (tmp_path / "cat" / "clip.mp4").write_bytes(b"no image")
    with pytest.warns(UserWarning, match=r"skipping 1 files that are not images, such as .*clip\.mp4"):
        assert len(ImageInputs(8).load(str(tmp_path)).train) == 15


def test_damaged_images_are_named_and_skipped_up_to_a_limit(tmp_path: Path) -> None:
    classes(tmp_path)
    whole = (tmp_path / "cat" / "0.png").read_bytes()
    (tmp_path / "cat" / "0.png").write_bytes(whole[: len(whole) // 2])
    with pytest.warns(UserWarning, match=r"skipping 1 of \d+ images: .*0\.png is not a readable image"):
        found = ImageInputs(8).load(str(tmp_path))
    assert len(found.train) + len(found.validation) + len(found.test) == 19
    for i in range(1, 6):
        (tmp_path / "cat" / f"{i}.png").write_bytes(b"")
    with pytest.raises(VisadaptError, match=r"images cannot be read, and at most 5% may be skipped"):
        ImageInputs(8).load(str(tmp_path))
    with pytest.warns(UserWarning, match="skipping"):
        assert len(ImageInputs(8).load(str(tmp_path), damaged=0.9).test) >= 1


def test_every_class_keeps_an_image_to_train_on_where_it_can(tmp_path: Path) -> None:
    classes(tmp_path / "one", 10)
    for i in range(5):
        image(tmp_path / "one" / f"rare{i}" / "0.png")
    found = ImageInputs(8).load(str(tmp_path / "one"))
    assert (found.train.labels.bincount() > 0).all()
    assert len(found.train) + len(found.validation) + len(found.test) == 25
    assert not any("left to train" in remark for remark in found.remarks)
    classes(tmp_path / "single", 1, tuple(f"c{i}" for i in range(20)))
    found = ImageInputs(8).load(str(tmp_path / "single"))
    assert "single: no images are left to train 5 of 20 classes, such as 'c" in found.remarks[-1]


def remarks_of(root: Path, rows: Callable[[list[str]], list[str]]) -> str:
    found = ImageInputs(8).load(str(tabled(rows)(root)))
    return " ".join(remark for remark in found.remarks if "held out for" not in remark)


def test_what_is_probably_a_mistake_in_a_table_is_said(tmp_path: Path) -> None:
    assert remarks_of(tmp_path / "a", lambda rows: rows) == ""
    again = remarks_of(tmp_path / "b", lambda rows: [*rows, rows[0]])
    assert again == "images.csv: 1 rows name an image again: one copy may be trained on and another one held out"
    other = remarks_of(tmp_path / "c", lambda rows: [*rows, "cat0.png,dog"])
    assert other == "images.csv: 1 rows name an image again with another label, such as 'cat0.png'"
    alike = remarks_of(tmp_path / "d", lambda rows: [*rows, "cat0.png,Cat", "cat1.png,NaN"])
    assert "classes 'Cat' and 'cat' differ only in case" in alike
    assert "the label 'NaN' is taken as a class" in alike


def test_a_class_of_damaged_images_only_is_said(tmp_path: Path) -> None:
    classes(tmp_path, 30)
    text_file("emu/0.png", b"")(tmp_path)
    with pytest.warns(UserWarning, match="skipping 1 of"):
        found = ImageInputs(8).load(str(tmp_path))
    assert "no images are left to train 1 of 3 classes, such as 'emu'" in found.remarks[-1]


def test_numbers_as_labels_are_in_the_order_of_numbers() -> None:
    assert ordered(["10.0", "2.0", "-1"]) == ["-1", "2.0", "10.0"]
    assert ordered(["7", "007", "07", "6"]) == ["6", "007", "07", "7"], "whatever order a set has"
    assert ordered(["10", "2", "x"]) == ["10", "2", "x"]


def test_a_pipe_among_the_images_is_not_waited_for(tmp_path: Path) -> None:
    classes(tmp_path)
    os.mkfifo(tmp_path / "cat" / "pipe.png")
    with pytest.warns(UserWarning, match=r"skipping 1 of .*pipe\.png must be a file, got a pipe"):
        found = ImageInputs(8).load(str(tmp_path), labels=("cat", "dog"), whole=True)
    assert len(found.test) == 20


def test_a_link_to_nothing_is_a_damaged_image(tmp_path: Path) -> None:
    classes(tmp_path)
    (tmp_path / "cat" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.warns(UserWarning, match=r"skipping 1 of .*cannot read .*gone\.png: No such file"):
        found = ImageInputs(8).load(str(tmp_path), labels=("cat", "dog"), whole=True)
    assert len(found.test) == 20


def test_sets_larger_than_the_memory_given_are_read_when_needed(tmp_path: Path) -> None:
    classes(tmp_path)
    (tmp_path / "dog" / "3.png").write_bytes(b"")
    with pytest.warns(UserWarning, match="skipping 1 of"):
        held = ImageInputs(8).load(str(tmp_path))
    with pytest.warns(UserWarning, match="skipping 1 of"):
        found = ImageInputs(8).load(str(tmp_path), memory=1000)
    for name in ("train", "validation", "test"):
        lazy = getattr(found, name)
        assert isinstance(lazy, ImageFiles)
        batches = list(lazy.batches(4))
        assert torch.equal(torch.cat([images for images, _ in batches]), getattr(held, name).images)
        assert torch.equal(torch.cat([labels for _, labels in batches]), getattr(held, name).labels)


def pixel(file: Path) -> list[int]:
    read: list[int] = read_images([file], 4)[0, :, 0, 0].tolist()
    return read


def test_modes_mean_what_they_show(tmp_path: Path) -> None:
    assert pixel(image(tmp_path / "clear.png", (0, 0, 0, 0), "RGBA")) == [255, 255, 255]
    assert pixel(image(tmp_path / "half.png", (255, 0, 0, 128), "RGBA"))[0] == 255
    assert pixel(image(tmp_path / "gray-alpha.png", (0, 0), "LA")) == [255, 255, 255]
    assert pixel(image(tmp_path / "gray.png", 77, "L")) == [77, 77, 77]
    assert pixel(image(tmp_path / "bit.png", 1, "1")) == [255, 255, 255]
    assert pixel(image(tmp_path / "print.jpg", (0, 0, 0, 0), "CMYK")) == [255, 255, 255]
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    palette.save(tmp_path / "palette.png")
    assert pixel(tmp_path / "palette.png") == [10, 20, 30]
    palette.save(tmp_path / "clear-palette.png", transparency=1)
    assert pixel(tmp_path / "clear-palette.png") == [255, 255, 255]
    palette.save(tmp_path / "clear.gif", transparency=1)
    assert pixel(tmp_path / "clear.gif") == [255, 255, 255]
    Image.new("RGB", (8, 8), RED).save(
        tmp_path / "moving.gif", save_all=True, append_images=[Image.new("RGB", (8, 8), GREEN)]
    )
    assert pixel(tmp_path / "moving.gif")[0] > 200


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_orientation_of_exif_is_applied(tmp_path: Path, suffix: str) -> None:
    stripes = np.zeros((20, 40, 3), np.uint8)
    stripes[:, :20] = 255
    turned = Image.fromarray(stripes)
    exif = turned.getexif()
    exif[0x0112] = 6  # shown a quarter turn clockwise
    turned.save(tmp_path / f"turned.{suffix}", exif=exif)
    read = read_images([tmp_path / f"turned.{suffix}"], 20)[0]
    top, bottom = read[:, :5].float().mean(), read[:, -5:].float().mean()
    assert top > bottom + 100, "the left half becomes the upper one"


def test_heic_and_avif_are_read_where_a_plugin_is(tmp_path: Path) -> None:
    pytest.importorskip("pillow_heif")
    from PIL import features

    from visadapt.data.image_file import pil

    pil()
    assert pixel(image(tmp_path / "a.heic", GREEN, size=(64, 64)))[1] > 200
    if features.check("avif"):
        assert pixel(image(tmp_path / "a.avif", GREEN, size=(64, 64)))[1] > 200


def test_sets_of_the_datasets_library(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    names = datasets.ClassLabel(names=["cat", "dog"])
    features = datasets.Features({"image": datasets.Image(), "label": names})

    def made(count: int) -> Any:
        rows = [
            {"image": Image.new("RGB", (9, 9), COLORS[n]), "label": n} for n in ("cat", "dog") for _ in range(count)
        ]
        return datasets.Dataset.from_list(rows, features=features)

    whole = made(10)
    assert [len(part) for part in (load_images(whole).train, load_images(whole).test)] == [16, 4]
    both_splits = datasets.DatasetDict({"train": made(5), "test": made(2)})
    both_splits.save_to_disk(tmp_path / "saved")
    for data in (both_splits, tmp_path / "saved"):
        found = load_images(data)
        assert (found.classes, found.train.labels.tolist(), found.test.labels.tolist()) == (
            ("cat", "dog"), [0] * 5 + [1] * 5, [0, 0, 1, 1])  # fmt: skip
        assert found.train.images[0, :, 0, 0].tolist() == list(RED)
    lazy = ImageInputs(8).load(both_splits, memory=100)
    assert [len(images) for images, _ in lazy.train.batches(4)] == [4, 4, 1]
    with pytest.raises(VisadaptError, match="'hf/food101' would be downloaded: allow it with online="):
        load_images("hf/food101")
    with pytest.raises(VisadaptError, match="has the columns 'text', 'label': choose the column of images"):
        load_images(datasets.Dataset.from_dict({"text": ["a"], "label": [0]}))
    with pytest.raises(VisadaptError, match="must be a path, a name, a Dataset or a DatasetDict, got int"):
        load_images(7)


def csv(*rows: str, end: str = "\n") -> bytes:
    return end.join(rows).encode()


MANY = [f"text {i},{'ab'[i % 2]}" for i in range(20)]
TABS = [row.replace(",", "\t") for row in MANY]

TEXTS: dict[str, tuple[str, bytes, dict[str, Any], tuple[str, ...]]] = {
    "csv": ("a.csv", csv("text,label", *MANY), {}, ("a", "b")),
    "CSV": ("a.CSV", csv("text,label", *MANY), {}, ("a", "b")),
    "TSV": ("a.TSV", csv("text\tlabel", *TABS), {}, ("a", "b")),
    "tab": ("a.tab", csv("text\tlabel", *TABS), {}, ("a", "b")),
    "line ends of Windows": ("a.csv", csv("text,label", *MANY, end="\r\n"), {}, ("a", "b")),
    "byte order mark": ("a.csv", b"\xef\xbb\xbf" + csv("text,label", *MANY), {}, ("a", "b")),
    "UTF-16 of a spreadsheet": ("a.tsv", "\n".join(["text\tlabel", *TABS]).encode("utf-16"), {}, ("a", "b")),
    "UTF-32": ("a.csv", "\n".join(["text,label", *MANY]).encode("utf-32"), {}, ("a", "b")),
    "latin-1": ("a.csv", "\n".join(["text,label", *MANY, "é,a"]).encode("latin-1"), {"encoding": "latin-1"},
                ("a", "b")),
    "semicolons": ("a.csv", csv("text;label", *[r.replace(",", ";") for r in MANY]), {"delimiter": ";"}, ("a", "b")),
    "pandas' quoted TSV": (
        "a.tsv", csv("text\tlabel", *[f'"say ""{i}""\tso"\t{"ab"[i % 2]}' for i in range(20)]), {}, ("a", "b")),
    "lines in a cell": (
        "a.csv", csv("text,label", *[f'"one\ntwo {i}",{"ab"[i % 2]}' for i in range(20)]), {}, ("a", "b")),
    "numbers as column names": (
        "a.csv", csv("3,7,label", *[f"x,{r}" for r in MANY]), {"text": "7"}, ("a", "b")),
    "columns by number": ("a.csv", csv(*MANY), {"text": "0", "label": "1", "header": False}, ("a", "b")),
    "labels such as --5": (
        "a.csv", csv("text,label", *[f"t{i},{('--5', '-5')[i % 2]}" for i in range(20)]), {}, ("--5", "-5")),
    "negative numbers": ("a.csv", csv("text,label", *[f"t{i},{i % 3 - 1}" for i in range(20)]), {}, ("-1", "0", "1")),
    "real values": ("a.csv", csv("text,label", *[f"t{i},{i / 3}" for i in range(20)]), {"regression": True}, ()),
    "several labels": (
        "a.csv", csv("text,label", *[f"t{i},{('x|y', '', 'z')[i % 3]}" for i in range(21)]), {"multi_label": "|"},
        ("x", "y", "z")),
    "blank lines": ("a.csv", csv("text,label", "", *MANY, "", ""), {}, ("a", "b")),
    "a very long text": ("a.csv", csv("text,label", "x" * 200_000 + ",a", *MANY), {}, ("a", "b")),
    "a separator that Excel notes": (
        "a.csv", csv("sep=;", "text;label", *[r.replace(",", ";") for r in MANY], end="\r\n"), {}, ("a", "b")),
    "names in capitals": ("a.csv", csv("Text,Label", *MANY), {}, ("a", "b")),
    "whole numbers as pandas writes them": (
        "a.csv", csv("text,label", *[f"t{i},{(2.0, 10.0)[i % 2]}" for i in range(20)]), {}, ("2.0", "10.0")),
    "columns beyond the header, empty": ("a.csv", csv("text,label", *[f"{r},," for r in MANY]), {}, ("a", "b")),
}  # fmt: skip


@pytest.mark.parametrize("case", TEXTS)
def test_table_of_texts_is_read(tmp_path: Path, case: str) -> None:
    name, content, options, names = TEXTS[case]
    (tmp_path / name).write_bytes(content)
    found = load_text(tmp_path / name, **options)
    assert found.classes == names
    texts = [text for split in (found.train, found.validation, found.test) for text in split.texts]
    assert len(texts) == len({str(text) for text in texts}) >= 20, "no row is lost or doubled"
    assert not any(str(text).startswith('"') for text in texts)


BAD_TEXTS: dict[str, tuple[str, bytes, dict[str, Any], str]] = {
    "wrong encoding": ("a.csv", csv("text,label") + b"\nnaive,a\nna\xefve,a\n", {},
                       r"byte 0xef at offset 21, in row 3 .*give the file's encoding with encoding="),
    "open quote": ("a.csv", csv("text,label", '"never closed,a', *MANY), {}, "row 2: .*must be quoted"),
    "comma in a text": ("a.csv", csv("text,label", "good, really,a", *MANY), {},
                        "row 2 must have 2 columns, got 3 .*must be inside quotation marks"),
    "short row": ("a.csv", csv("text,label", "alone", *MANY), {}, "row 2 must have 2 columns, got 1"),
    "empty": ("a.csv", b"", {}, "has no rows"),
    "another separator": ("a.csv", csv("text;label", *[r.replace(",", ";") for r in MANY]), {},
                          r"one column, 'text;label' \(delimiter= sets"),
    "semicolons and quoted commas": (
        "a.csv", csv("text;label", *[f'"one, two {i}";{"ab"[i % 2]}' for i in range(20)]), {},
        r"one column, 'text;label' \(delimiter= sets"),
    "UTF-16 without a mark": (
        "a.csv", "\n".join(["text,label", *MANY]).encode("utf-16-le"), {}, "row 1 has a zero character, as UTF-16"),
    "packed otherwise": ("a.csv.bz2", b"BZh9", {}, "must be a table as text: save it as .csv"),
    "a spreadsheet": ("a.xlsx", b"PK\x03\x04", {}, "must be a table as text: save it as .csv"),
    "records that are packed": ("a.jsonl.gz", b"", {}, "must be unpacked first: only .csv and .tsv are read"),
    "no text column": ("a.csv", csv("words,label", *MANY), {}, "choose the text column with text="),
    "two of one name": ("a.csv", csv("text,label,label", *[f"{r},x" for r in MANY]), {},
                        "several columns 'label': choose one by its number"),
    "column that is not there": ("a.csv", csv("text,label", *MANY), {"label": "9"}, "must have 10 columns, got 2"),
    "delimiter of two characters": ("a.csv", csv("text,label", *MANY), {"delimiter": "||"},
                                    r"delimiter= must be one character, got '\|\|'"),
    "unknown encoding": ("a.csv", csv("text,label", *MANY), {"encoding": "utf-9"},
                         "encoding= must be an encoding of Python, got 'utf-9'"),
    "real values as classes": ("a.csv", csv("text,label", *[f"t{i},{i / 3}" for i in range(30)]), {},
                               "30 different numbers as labels, such as 0.0: give regression="),
    "words as real values": ("a.csv", csv("text,label", *MANY), {"regression": True},
                             "row 2: the label must be a finite number, got 'a'"),
    "both kinds of labels": ("a.csv", csv("text,label", *MANY), {"regression": True, "multi_label": ";"},
                             "give regression= or multi_label=, not both"),
    "a label each": ("a.csv", csv("text,label", *[f"t{i},c{i}" for i in range(30)]), {},
                     "30 different labels for 30 samples"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_TEXTS)
def test_table_of_texts_is_refused_in_one_line(tmp_path: Path, case: str) -> None:
    name, content, options, message = BAD_TEXTS[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(VisadaptError, match=message) as caught:
        load_text(tmp_path / name, **options)
    assert "\n" not in str(caught.value)


def test_the_command_line_is_told_of_its_own_options(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(csv("words,label", *MANY))
    with command_line(), pytest.raises(VisadaptError, match="choose the text column with --text"):
        load_text(tmp_path / "a.csv")


def test_folder_of_tables_in_any_case(tmp_path: Path) -> None:
    for name in ("Train.CSV", "TEST.csv"):
        (tmp_path / name).write_bytes(csv("text,label", *MANY))
    assert len(load_text(tmp_path).test) == 20
    (tmp_path / "Train.CSV").unlink()
    assert len(load_text(tmp_path, whole=True).test) == 20


def test_files_that_are_not_read_are_named(tmp_path: Path) -> None:
    for name in ("train.csv", "test.csv", "holdout.csv"):
        (tmp_path / name).write_bytes(csv("text,label", *MANY))
    with pytest.warns(UserWarning, match=r"'holdout\.csv' is none of the splits and is not used"):
        assert len(load_text(tmp_path).test) == 20
    (tmp_path / "holdout.csv").rename(tmp_path / "train.csv.gz")
    with pytest.raises(VisadaptError, match=r"two files for train, 'train\.csv' and 'train\.csv\.gz'"):
        load_text(tmp_path)
    (tmp_path / "test.csv").write_bytes(csv("text,label", *MANY, ",a"))
    with pytest.warns(UserWarning, match=r"test\.csv: 1 of 21 texts are empty, such as that of row 22"):
        assert len(load_text(tmp_path / "test.csv").test) == 4


def test_folder_of_json(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    for name in ("train", "test"):
        rows = [f'{{"text": "t{i}", "label": "{"ab"[i % 2]}"}}' for i in range(20)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows), encoding="utf-8")
    assert len(load_text(tmp_path).test) == 20


def test_images_in_memory_are_inputs_too() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (9, 9), RED).save(buffer, "PNG")
    stored = {"bytes": buffer.getvalue(), "path": None}
    assert torch.equal(ImageInputs(8).read([stored]), ImageInputs(8).read([Image.new("RGB", (9, 9), RED)]))


OPTIONS = ({"image": "file"}, {"label": "kind"}, {"root": "."}, {"header": True}, {"delimiter": ";"},
           {"encoding": "utf-8"}, {"regression": True}, {"multi_label": ";"})  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: next(iter(options)))
def test_options_of_tables_are_refused_for_folders_of_classes(tmp_path: Path, options: dict[str, Any]) -> None:
    name = next(iter(options))
    classes(tmp_path / "flat", 1)
    classes(tmp_path / "split" / "train", 1)
    for data in (tmp_path / "flat", tmp_path / "split", *(["cifar10"] if name != "root" else [])):
        with pytest.raises(VisadaptError, match=f"{name}= has no effect: "):
            find(data, **options)
        # those of the table that a task was trained on are for other data
        if name != "root":
            assert find(data, noted=options).splits


@pytest.mark.parametrize("options", [{"label": "x"}, {"text": "x"}, {"regression": True}, {"header": False}])
def test_options_of_tables_are_refused_for_texts_that_are_known_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(VisadaptError, match=f"{next(iter(options))}= has no effect: tweets comes with the package"):
        load_text("tweets", **options)
