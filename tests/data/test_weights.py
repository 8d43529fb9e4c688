"""The bundled ResNet-50 is a working ImageNet classifier with the strides of the paper's first form."""

import time

import pytest
import torch
from safetensors.torch import save_file

from visadapt.data import bundled, dequantise, load_images, normalize, resnet50
from visadapt.errors import VisadaptError

pytest.importorskip("torchvision")

# ImageNet classes that show what the CIFAR-10 class shows
SUPERCLASSES = {
    "dog": range(151, 269),
    "ship": (403, 484, 510, 554, 625, 628, 724, 780, 814, 833, 871, 914),
    "truck": (555, 569, 654, 675, 717, 734, 864, 867),
    "bird": (*range(7, 25), *range(80, 101), *range(127, 147)),
}


@pytest.fixture(scope="module")
def net() -> torch.nn.Module:
    return resnet50()


def test_is_torchvisions_class_in_eval_mode(net) -> None:
    from torchvision.models import ResNet

    assert type(net) is ResNet
    assert not net.training
    assert all(t.device.type == "cpu" for t in net.state_dict().values())
    assert all(p.dtype == torch.float32 and p.requires_grad for p in net.parameters())
    assert sum(p.numel() for p in net.parameters()) == 25_557_032


def test_stride_sits_in_the_first_conv(net) -> None:
    for stage in (net.layer2, net.layer3, net.layer4):
        assert stage[0].conv1.stride == (2, 2)
        assert stage[0].conv2.stride == (1, 1)


def test_running_statistics_do_not_underflow(net) -> None:
    # Keras adds 1e-3 to every variance, torch 1e-5: the difference is in the variances
    variances = [b for name, b in net.named_buffers() if name.endswith("running_var")]
    assert len(variances) == 53
    assert min(float(v.min()) for v in variances) >= 0.98e-3


def test_two_calls_share_no_memory() -> None:
    a, b = resnet50(), resnet50()
    with torch.no_grad():
        a.fc.weight.zero_()
    assert b.fc.weight.abs().sum() > 0


def test_is_fast(net) -> None:
    start = time.perf_counter()
    resnet50()
    assert time.perf_counter() - start < 5  # about 0.2 s; the bound is for a busy machine


def test_predictions_on_real_images(net) -> None:
    cifar = load_images("cifar10")
    groups = {name: torch.zeros(1000) for name in SUPERCLASSES}
    for name, members in SUPERCLASSES.items():
        groups[name][list(members)] = 1
    weights = torch.stack(list(groups.values()))
    right = 0
    for index, name in enumerate(SUPERCLASSES):
        chosen = (cifar.test.labels == cifar.classes.index(name)).nonzero().flatten()[:10]
        with torch.inference_mode():
            probabilities = net(normalize(cifar.test.images[chosen], 224)).softmax(1)
        right += int(((probabilities @ weights.T).argmax(1) == index).sum())
    assert right >= 28  # of 40, by chance 10


def test_dequantise_multiplies_by_channel(tmp_path) -> None:
    steps = torch.randint(-127, 128, (4, 3, 2, 2), dtype=torch.int8)
    scale, bias = torch.rand(4), torch.rand(4)
    save_file({"w": steps, "w_scale": scale, "b": bias}, tmp_path / "a.safetensors")
    state = dequantise(tmp_path / "a.safetensors")
    assert set(state) == {"w", "b"}
    assert torch.equal(state["b"], bias)
    assert torch.equal(state["w"], steps.float() * scale[:, None, None, None])


def test_dequantise_refuses_a_missing_scale(tmp_path) -> None:
    save_file({"w": torch.zeros(4, 3, dtype=torch.int8)}, tmp_path / "a.safetensors")
    with pytest.raises(VisadaptError, match=r"a\.safetensors.*'w' must have one scale"):
        dequantise(tmp_path / "a.safetensors")


@pytest.mark.parametrize("content", [b"", b"not a safetensors file at all", None])
def test_damaged_file_is_one_clear_error(tmp_path, content: bytes | None) -> None:
    file = tmp_path / "a.safetensors"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(VisadaptError, match=r"cannot read .*a\.safetensors"):
        dequantise(file)


def test_truncated_weights_are_one_clear_error(tmp_path) -> None:
    whole = bundled.path("resnet50_imagenet_int8.safetensors").read_bytes()
    (tmp_path / "a.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(VisadaptError, match="cannot read the weights"):
        dequantise(tmp_path / "a.safetensors")
