"""Build `fashion-mnist.webp` and `fashion-mnist.json`: 2,000 train and 1,000 test images, balanced by class."""

import common
import numpy as np

CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
SOURCE = "dataset-fashion-mnist=0.0~git20200523.55506a9-1"


def main() -> None:
    """Write both files."""
    root = common.deb(SOURCE, "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0")
    folder = root / "usr/share/datasets/fashion-mnist"

    def split(name: str) -> tuple[np.ndarray, np.ndarray]:
        images, labels = f"{name}-images-idx3-ubyte.gz", f"{name}-labels-idx1-ubyte.gz"
        return common.read_idx(folder / images), common.read_idx(folder / labels)

    common.write_images("fashion-mnist", CLASSES, f"Debian {SOURCE}", 0, split("train"), split("t10k"), (2000, 1000))


if __name__ == "__main__":
    main()
