"""Image sets: bundled, of scikit-learn, of torchvision from local files, folders; normalisation and augmentation."""

import hashlib
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from visadapt.data import (
    ImageSet,
    ImageSplit,
    augment,
    bundled,
    image_files,
    load_images,
    load_squares,
    normalize,
    read_images,
    renumbered,
)
from visadapt.errors import VisadaptError

BUNDLED = {"cifar10": (5000, 2000, 32), "mnist": (2000, 1000, 28), "fashion-mnist": (2000, 1000, 28)}


@pytest.fixture(scope="module", params=BUNDLED)
def bundled_set(request: pytest.FixtureRequest) -> ImageSet:
    return load_images(request.param)


def test_bundled_sizes_and_balance(bundled_set: ImageSet) -> None:
    train, test, side = BUNDLED[bundled_set.name]
    for split, count in ((bundled_set.train, train), (bundled_set.test, test)):
        assert split.images.shape == (count, 3, side, side)
        assert split.labels.bincount().tolist() == [count // 10] * 10
    assert len(set(bundled_set.classes)) == 10


def test_bundled_images_are_all_different(bundled_set: ImageSet) -> None:
    images = torch.cat([bundled_set.train.images, bundled_set.test.images]).numpy()
    assert len({hashlib.sha256(image.tobytes()).digest() for image in images}) == len(images)


def test_bundled_gray_is_replicated() -> None:
    images = load_images("mnist").test.images
    assert torch.equal(images[:, 0], images[:, 1])
    assert torch.equal(images[:, 0], images[:, 2])


def test_bundled_indices_are_recorded() -> None:
    about = json.loads(bundled.path("cifar10.json").read_text())
    for split, count in (("train", 50_000), ("test", 10_000)):
        indices = about[split]["indices"]
        assert indices == sorted(set(indices))
        assert 0 <= indices[0] <= indices[-1] < count


def test_bundled_pixels_belong_to_their_labels(bundled_set: ImageSet) -> None:
    # tiles out of step with the labels would leave the nearest class mean no better than chance, 10 %
    train, test = (s.images.float().flatten(1) for s in (bundled_set.train, bundled_set.test))
    means = torch.stack([train[bundled_set.train.labels == c].mean(0) for c in range(10)])
    right = (torch.cdist(test, means).argmin(1) == bundled_set.test.labels).float().mean()
    assert right > (0.25 if bundled_set.name == "cifar10" else 0.6)


def test_digits() -> None:
    pytest.importorskip("sklearn")
    digits = load_images("digits")
    assert digits.train.images.shape == (1437, 3, 8, 8)
    assert digits.test.images.shape == (360, 3, 8, 8)
    assert int(digits.train.images.max()) == 255
    assert torch.equal(load_images("digits").test.labels, digits.test.labels)


def test_size_resizes_a_bundled_set() -> None:
    assert load_images("mnist", size=14).test.images.shape == (1000, 3, 14, 14)


def test_holdout_is_balanced_seeded_and_disjoint() -> None:
    mnist = load_images("mnist")
    train, validation = mnist.holdout(500, seed=3)
    assert validation.labels.bincount().tolist() == [50] * 10
    assert train.labels.bincount().tolist() == [150] * 10

    def contents(split: ImageSplit) -> set[bytes]:
        return {image.tobytes() for image in split.images.numpy()}

    assert not contents(train) & contents(validation)
    assert torch.equal(mnist.holdout(500, seed=3)[1].images, validation.images)
    assert not torch.equal(mnist.holdout(500, seed=4)[1].images, validation.images)


def test_holdout_takes_exactly_n_of_unequal_classes() -> None:
    labels = torch.tensor([0] * 7 + [1] * 2 + [2] * 11)
    split = ImageSplit(torch.zeros(20, 3, 2, 2, dtype=torch.uint8), labels)
    for n in range(1, 20):
        train, validation = ImageSet("a", ("x", "y", "z"), split, split).holdout(n)
        assert (len(train), len(validation)) == (20 - n, n)
        expected = torch.tensor([7, 2, 11]) * n / 20
        assert (validation.labels.bincount(minlength=3) - expected).abs().max() < 1


@pytest.mark.parametrize("n", [0, 2000, -1])
def test_holdout_out_of_range(n: int) -> None:
    with pytest.raises(VisadaptError, match=f"must be from 1 to 1999, got {n}"):
        load_images("mnist").holdout(n)


def test_unknown_set_gets_the_nearest() -> None:
    with pytest.raises(VisadaptError, match=r"'fashion_mnist'; did you mean .*'fashion-mnist'"):
        load_images("fashion_mnist")


def test_unknown_set_is_not_a_traceback_of_a_library(tmp_path: Path) -> None:
    with pytest.raises(VisadaptError, match="no image data set or folder"):
        load_images(tmp_path / "nowhere")


def save(file: Path, width: int, height: int, color: int | tuple[int, ...] = (200, 30, 60), mode: str = "RGB") -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (width, height), color).save(file)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for split, count in (("train", 3), ("val", 2)):
        for name, color in (("cat", (250, 0, 0)), ("dog", (0, 250, 0))):
            for i in range(count):
                save(tmp_path / split / name / f"{i}.png", 12, 10, color)
    return tmp_path


def test_folder(folder: Path) -> None:
    (folder / "train" / "cat" / "notes.txt").write_text("not a picture")
    found = load_images(folder)
    assert found.classes == ("cat", "dog")
    assert found.train.images.shape == (6, 3, 10, 12)
    assert found.train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert found.test.labels.tolist() == [0, 0, 1, 1]
    assert found.train.images[0, :, 0, 0].tolist() == [250, 0, 0]


def test_folder_prefers_test_to_val(folder: Path) -> None:
    save(folder / "test" / "dog" / "0.png", 12, 10)
    assert load_images(folder).test.labels.tolist() == [1]


def test_folder_of_ragged_pictures(folder: Path) -> None:
    save(folder / "train" / "cat" / "wide.jpg", 40, 20)
    save(folder / "train" / "cat" / "gray.png", 9, 33, 77, "L")
    with pytest.raises(VisadaptError, match="differ in size: give size="):
        load_images(folder)
    found = load_images(folder, size=16)
    assert found.train.images.shape == (8, 3, 16, 16)
    gray = found.train.images[3]
    assert gray.unique().tolist() == [77]


def test_folder_crops_the_centre(folder: Path) -> None:
    stripes = np.zeros((10, 30, 3), np.uint8)
    stripes[:, 10:20] = 255
    Image.fromarray(stripes).save(folder / "val" / "dog" / "stripes.png")
    assert load_images(folder, size=10).test.images[-1].unique().tolist() == [255]


def test_folder_faults(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(VisadaptError, match="size must be at least 1 pixel, got 0"):
        load_images(folder, size=0)
    (folder / "val" / "doge").mkdir()
    with pytest.raises(VisadaptError, match="class 'doge' is not in 'train'; did you mean 'dog'"):
        load_images(folder)
    (folder / "val" / "doge").rmdir()
    (folder / "val" / "dog" / "broken.png").write_bytes(b"\x89PNG nothing")
    with pytest.warns(UserWarning, match=r"skipping 1 of 5 images: .*broken\.png is not a readable image"):
        assert len(load_images(folder).test) == 4
    for name in ("one", "two"):
        (folder / "train" / "dog" / f"{name}.png").write_bytes(b"\x89PNG nothing")
    with pytest.raises(
        VisadaptError, match=r"train: 2 of 8 images cannot be read, and at most 5% may be skipped \(damaged=\): .*one"
    ):
        load_images(folder)


def test_folder_without_splits(tmp_path: Path) -> None:
    with pytest.raises(
        VisadaptError, match=r"must hold labelled images, got no images; the layouts are: CLASS/image\.jpg"
    ):
        load_images(tmp_path)
    (tmp_path / "train").mkdir()
    (tmp_path / "test").mkdir()
    with pytest.raises(VisadaptError, match="must have one folder per class, got none"):
        load_images(tmp_path)
    (tmp_path / "train" / "cat").mkdir()
    with pytest.raises(VisadaptError, match="cat must have at least one image, got none"):
        load_images(tmp_path)
    save(tmp_path / "train" / "cat" / "0.png", 4, 4)
    with pytest.raises(VisadaptError, match="test must have at least one image, got none"):
        load_images(tmp_path)


def test_hidden_folders_are_no_classes(folder: Path) -> None:
    for split in ("train", "val"):
        (folder / split / ".ipynb_checkpoints").mkdir()
    assert load_images(folder).classes == ("cat", "dog")


def test_squares_of_one_size_are_kept_and_other_pictures_cropped(folder: Path) -> None:
    assert load_squares(folder, 8).train.images.shape == (6, 3, 8, 8), "12 by 10 pixels would be distorted"
    save(folder / "train" / "cat" / "wide.jpg", 40, 20)
    assert load_squares(folder, 8).train.images.shape == (7, 3, 8, 8)
    assert torch.equal(load_squares("mnist", 14).test.images, load_images("mnist").test.images)


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_16_bits_become_8(tmp_path: Path, suffix: str) -> None:
    values = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    Image.fromarray(values).save(tmp_path / f"deep.{suffix}")
    read = read_images([tmp_path / f"deep.{suffix}"], 64)[0]
    assert torch.equal(read, torch.from_numpy((values >> 8).astype(np.uint8)).expand(3, 64, 64))


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_32_bits_have_no_known_range(tmp_path: Path, dtype: type) -> None:
    Image.fromarray(np.ones((4, 4), dtype)).save(tmp_path / "deep.tif")
    with pytest.raises(VisadaptError, match=r"deep\.tif: 32-bit pixels .* have no known range"):
        read_images([tmp_path / "deep.tif"], 4)


@pytest.mark.parametrize("damage", ["checksum", "header", "bomb"])
def test_damaged_pictures_are_named(tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "bad.png"
    save(file, 40, 40)
    if damage == "checksum":
        content = bytearray(file.read_bytes())
        content[content.index(b"IDAT") + 5] ^= 255
        file.write_bytes(content)
    elif damage == "header":
        file = tmp_path / "bad.ppm"
        file.write_bytes(b"P6 4 x 255 \0")
    else:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    with pytest.raises(VisadaptError, match=r"bad\.p.* is not a readable image"):
        read_images([file], 4)


@pytest.fixture
def torchvision_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    datasets = pytest.importorskip("torchvision.datasets")
    base = tmp_path / datasets.CIFAR10.base_folder
    base.mkdir()
    rng = np.random.Generator(np.random.PCG64(0))
    names = [name for name, _ in (*datasets.CIFAR10.train_list, *datasets.CIFAR10.test_list)]
    for name in names:
        rows = rng.integers(0, 256, (4, 3072), np.uint8)
        (base / name).write_bytes(pickle.dumps({"data": rows, "labels": [0, 1, 2, 2]}))
    (base / "batches.meta").write_bytes(pickle.dumps({"label_names": ["airplane", "automobile", "bird"]}))
    # the fixture is not the real set, so its sums are not the known ones
    monkeypatch.setattr(datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setitem(datasets.CIFAR10.meta, "md5", None)
    return tmp_path


def test_torchvision(torchvision_root: Path) -> None:
    found = load_images("torchvision/CIFAR10", root=torchvision_root)
    assert found.classes == ("airplane", "automobile", "bird")
    assert found.train.images.shape == (20, 3, 32, 32)
    assert found.test.labels.tolist() == [0, 1, 2, 2]
    raw = pickle.loads((torchvision_root / "cifar-10-batches-py" / "test_batch").read_bytes())["data"]
    assert torch.equal(found.test.images, torch.from_numpy(raw.reshape(-1, 3, 32, 32)))
    assert load_images("torchvision/CIFAR10", root=torchvision_root, size=8).test.images.shape == (4, 3, 8, 8)


def test_torchvision_faults(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    with pytest.raises(VisadaptError, match="needs root="):
        load_images("torchvision/CIFAR10")
    with pytest.raises(VisadaptError, match=r"no torchvision classification data set 'CIFAR11'; did you mean 'CIFAR10"):
        load_images("torchvision/CIFAR11", root=tmp_path)
    with pytest.raises(VisadaptError, match=r"could not load CIFAR10 .*download=True"):
        load_images("torchvision/CIFAR10", root=tmp_path)


def test_every_torchvision_set_exists_and_takes_its_options() -> None:
    import inspect

    datasets = pytest.importorskip("torchvision.datasets")
    from visadapt.data import image_sources

    for name, options in image_sources._TORCHVISION.items():
        signature = inspect.signature(getattr(datasets, name))
        for option in options:
            signature.bind(root=".", download=False, **option)


def test_split_checks_its_tensors() -> None:
    images, labels = torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.tensor([0, 1])
    with pytest.raises(VisadaptError, match=r"uint8 of shape \(N, 3, H, W\), got torch.float32"):
        ImageSplit(images.float(), labels)
    with pytest.raises(VisadaptError, match=r"labels must be int64 of shape \(2,\), got torch.int64 of \(1,\)"):
        ImageSplit(images, labels[:1])
    split = ImageSplit(images, labels)
    with pytest.raises(VisadaptError, match="labels must be from 0 to 0"):
        ImageSet("a", ("one",), split, split)


def test_normalize_values_and_size() -> None:
    images = torch.full((2, 3, 8, 8), 255, dtype=torch.uint8)
    x = normalize(images, 16)
    assert x.shape == (2, 3, 16, 16)
    assert x.dtype == torch.float32
    expected = [(1 - m) / s for m, s in zip((0.485, 0.456, 0.406), (0.229, 0.224, 0.225), strict=True)]
    torch.testing.assert_close(x.amax((0, 2, 3)), torch.tensor(expected))
    assert normalize(images).shape == (2, 3, 8, 8)
    assert int(images.min()) == 255


def test_normalize_takes_other_statistics() -> None:
    x = normalize(torch.full((1, 3, 2, 2), 51, dtype=torch.uint8), mean=(0.2, 0.0, 0.1), std=(1.0, 0.5, 0.1))
    torch.testing.assert_close(x[0, :, 0, 0], torch.tensor([0.0, 0.4, 1.0]))


def test_normalize_antialiases() -> None:
    board = (torch.arange(32)[:, None] + torch.arange(32)) % 2 * 255
    x = normalize(board.to(torch.uint8).expand(1, 3, 32, 32), 8, mean=(0, 0, 0), std=(1, 1, 1))
    assert (x[..., 1:-1, 1:-1] - 0.5).abs().max() < 0.05


@pytest.mark.parametrize("bad", [torch.zeros(3, 8, 8, dtype=torch.uint8), torch.zeros(2, 1, 8, 8, dtype=torch.uint8)])
def test_transforms_refuse_other_shapes(bad: torch.Tensor) -> None:
    for call in (lambda: normalize(bad, 8), lambda: augment(bad, torch.Generator())):
        with pytest.raises(VisadaptError, match=r"shape \(N, 3, H, W\)"):
            call()


def test_normalize_refuses_float() -> None:
    with pytest.raises(VisadaptError, match=r"images must be uint8, got torch\.float32"):
        normalize(torch.zeros(2, 3, 8, 8), 8)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_augment_is_seeded_and_keeps_the_kind(dtype: torch.dtype) -> None:
    images = torch.randint(1, 255, (16, 3, 10, 12), generator=seeded(0)).to(dtype)
    one, same, other = (augment(images, seeded(s)) for s in (1, 1, 2))
    assert one.shape == images.shape
    assert one.dtype == dtype
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_augment_is_a_shift_and_a_flip() -> None:
    images = torch.randint(1, 255, (40, 3, 6, 6), dtype=torch.uint8, generator=seeded(0))
    out = augment(images, seeded(1), crop_padding=2)
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
    seen = set()
    for image, result in zip(padded, out, strict=True):
        views = {
            (y, x, f): image[:, y : y + 6, x : x + 6].flip(-1) if f else image[:, y : y + 6, x : x + 6]
            for y in range(5)
            for x in range(5)
            for f in (0, 1)
        }
        seen |= {key for key, view in views.items() if torch.equal(view, result)}
    assert len(seen) > 20
    assert {f for _, _, f in seen} == {0, 1}


def test_augment_can_do_nothing() -> None:
    images = torch.randint(0, 255, (4, 3, 6, 6), dtype=torch.uint8)
    assert torch.equal(augment(images, seeded(0), flip=False, crop_padding=0), images)
    with pytest.raises(VisadaptError, match="crop_padding must not be negative, got -1"):
        augment(images, seeded(0), crop_padding=-1)


def test_a_namesake_of_a_set_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mnist").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.warns(UserWarning, match=r"loading the data set 'mnist', not .*'\./mnist'"):
        assert load_images("mnist").name == "mnist"


def test_pictures_by_themselves(folder: Path) -> None:
    files = image_files(folder / "train")
    assert [file.name for file in files] == ["0.png", "1.png", "2.png"] * 2
    assert image_files(files[0]) == [files[0]]
    images = read_images(files, 8)
    assert images.shape == (6, 3, 8, 8)
    assert torch.equal(images[0], load_images(folder, size=8).train.images[0])
    with pytest.raises(VisadaptError, match=r"no image or folder .*trian; did you mean 'train'"):
        image_files(folder / "trian")
    (folder / "empty").mkdir()
    with pytest.raises(VisadaptError, match="must have at least one image, got none"):
        image_files(folder / "empty")


def test_renumbered_by_name(folder: Path) -> None:
    found = renumbered(load_images(folder), ["ape", "dog", "cat"])
    assert found.classes == ("ape", "dog", "cat")
    assert found.train.labels.tolist() == [2, 2, 2, 1, 1, 1]
    assert found.test.labels.tolist() == [2, 2, 1, 1]
    with pytest.raises(VisadaptError, match=r"has a class 'cat' that the task does not have; did you mean 'cats'"):
        renumbered(load_images(folder), ["cats", "dog"])
