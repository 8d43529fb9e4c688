"""Backbones whose weights are stored otherwise: quantised, in subclasses of tensor, sparse, or not there yet (meta)."""

import copy

import pytest
import timm
import torch
from torch import nn
from torch.utils._python_dispatch import return_and_correct_aliasing

import visadapt
from visadapt.backbone.fingerprint import fingerprint
from visadapt.backbone.stored_values import plain_tensors

pytestmark = pytest.mark.filterwarnings("ignore:.*quant.*:DeprecationWarning", "ignore:.*quant.*:UserWarning")


class Int8(torch.Tensor):
    """A weight kept as codes and a scale per row, as torchao keeps it."""

    @staticmethod
    def __new__(cls, codes, scale):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape, dtype=scale.dtype, device=codes.device)

    def __init__(self, codes, scale):
        self.codes, self.scale = codes, scale

    @classmethod
    def of(cls, weight):
        scale = weight.abs().amax(1, keepdim=True) / 127
        return cls((weight / scale).round().to(torch.int8), scale)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.linear:
            x, weight = args[0], args[1]
            return func(x, weight.codes.to(weight.scale.dtype) * weight.scale, *args[2:], **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):
            out = cls(func(args[0].codes), func(args[0].scale))
            return return_and_correct_aliasing(func, args, kwargs, out)
        raise NotImplementedError(func)


class Flattened(Int8):
    def __tensor_flatten__(self):
        return ["codes", "scale"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, context, size, stride):
        return cls(inner["codes"], inner["scale"])


class Opaque(Int8):
    def __init__(self, codes, scale):
        self.hidden = [codes, scale]

    codes = property(lambda self: self.hidden[0])
    scale = property(lambda self: self.hidden[1])


VIT = {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 4}


def vit(kind=None, seed=0):
    torch.manual_seed(seed)
    model = timm.create_model("vit_tiny_patch16_224", **VIT).eval()
    if kind is not None:
        for block in model.blocks:
            block.mlp.fc1.weight = nn.Parameter(kind.of(block.mlp.fc1.weight.detach()), requires_grad=False)
    return model


def dynamic(seed=0):
    return torch.ao.quantization.quantize_dynamic(vit(seed=seed), {nn.Linear})


MAKERS = {
    "subclass": lambda seed=0: vit(Int8, seed),
    "flattened subclass": lambda seed=0: vit(Flattened, seed),
    "torch.ao": dynamic,
}


@pytest.mark.parametrize("kind", MAKERS)
def test_task_of_a_quantised_backbone_is_saved_and_loaded(kind, tmp_path):
    make = MAKERS[kind]
    model, x = make(), torch.randn(2, 3, 32, 32)
    visadapt.inject(model, visadapt.Bottleneck(m=4, init_std=0.1), task="t", head="frozen")
    path = visadapt.save(model, "t", tmp_path / "t")
    again = make()
    visadapt.load(again, path)
    with torch.no_grad():
        assert torch.equal(again(x), model(x))


@pytest.mark.parametrize("kind", MAKERS)
def test_other_quantised_weights_are_told_apart(kind, tmp_path):
    make = MAKERS[kind]
    model, other = make(), make()
    visadapt.inject(model, m=4, task="t", head="frozen")
    path = visadapt.save(model, "t", tmp_path / "t")
    other.blocks[1].mlp.fc1 = make(seed=1).blocks[1].mlp.fc1
    with pytest.raises(visadapt.VisadaptError, match=r"other weights in blocks\.1"):
        visadapt.load(other, path)


def test_weights_that_cannot_be_read_are_named(tmp_path):
    model = vit(Opaque)
    visadapt.inject(model, m=4, task="t")
    with pytest.raises(visadapt.VisadaptError, match=r"blocks\.0\.mlp\.fc1\.weight is a Opaque"):
        visadapt.save(model, "t", tmp_path / "t")
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize("kind", [Int8, Flattened, Opaque])
def test_nothing_is_merged_into_quantised_weights(kind):
    model = vit(kind)
    visadapt.inject(model, visadapt.LoRA(r=2), task="t", num_classes=3, where="*.mlp.fc1", norms="frozen")
    with pytest.raises(
        visadapt.VisadaptError, match=rf"nothing can be merged into blocks\.\S+, which is stored as a {kind.__name__}"
    ):
        visadapt.merge(model, "t")


def per_channel(scale):
    return torch.quantize_per_channel(
        torch.ones(2, 3), torch.tensor([scale, 1.0]), torch.zeros(2).long(), 0, torch.qint8
    )


TENSORS = {
    "per tensor": lambda s: torch.quantize_per_tensor(torch.ones(2, 3) * s, s, 0, torch.qint8),
    "per channel": per_channel,
    "sparse": lambda s: (torch.eye(3) * s).to_sparse(),
    "sparse rows": lambda s: (torch.eye(3) * s).to_sparse_csr(),
    "float8": lambda s: torch.full((3,), s).to(torch.float8_e4m3fn),
    "complex": lambda s: torch.full((3,), s + 1j),
    "empty": lambda s: torch.empty(int(s), 0),
}


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("kind", TENSORS)
def test_fingerprint_of_any_buffer(kind):
    def digest(scale):
        model = nn.Module()
        model.register_buffer("b", TENSORS[kind](scale))
        known = {}
        first = fingerprint(model, known=known)
        assert fingerprint(model, known=known) == first
        return first

    assert digest(1.0) == digest(1.0)
    assert digest(1.0) != digest(2.0)


def test_plain_tensors_are_read_where_they_are():
    weight = nn.Parameter(torch.ones(2))
    assert plain_tensors(weight, "w")[0] is weight


@pytest.mark.parametrize("way", ["assign", "to_empty"])
def test_meta_then_weights_then_task(way, tmp_path):
    model, x = vit(), torch.randn(2, 3, 32, 32)
    weights = copy.deepcopy(model.state_dict())
    visadapt.inject(model, visadapt.Bottleneck(m=4, init_std=0.1), task="t", num_classes=3)
    path = visadapt.save(model, "t", tmp_path / "t")
    with torch.device("meta"):
        late = timm.create_model("vit_tiny_patch16_224", **VIT).eval()
    visadapt.inject(late, m=4, task="other", num_classes=2)
    with pytest.raises(visadapt.VisadaptError, match="meta device: load the backbone's weights first"):
        visadapt.load(late, path)
    assert list(visadapt.tasks(late)) == ["other"]
    if way == "to_empty":
        late.to_empty(device="cpu")
    late.load_state_dict(weights, assign=way == "assign")
    visadapt.load(late, path)
    visadapt.activate(late, "t")
    with torch.no_grad():
        assert torch.equal(late(x), model(x))


def test_meta_then_a_checkpoint_with_the_task():
    model, x = vit(), torch.randn(2, 3, 32, 32)
    visadapt.inject(model, visadapt.Bottleneck(m=4, init_std=0.1), task="t", num_classes=3)
    with torch.device("meta"):
        late = timm.create_model("vit_tiny_patch16_224", **VIT).eval()
    visadapt.inject(late, m=4, task="t", num_classes=3)
    late.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)
    with torch.no_grad():
        assert torch.equal(late(x), model(x))
    assert all(p.requires_grad for p in visadapt.parameters(late, "t"))


def late_vit(method, norms):
    """A model with a task, both made on the meta device."""
    with torch.device("meta"):
        late = timm.create_model("vit_tiny_patch16_224", **VIT).eval()
    return visadapt.inject(late, method, task="t", num_classes=3, norms=norms)


OWN = [(visadapt.Bottleneck(m=4), "affine"), (visadapt.LoRA(r=2), "frozen"), (visadapt.Full(), "frozen")]


@pytest.mark.parametrize("way", ["assign", "to_empty"])
@pytest.mark.parametrize(("method", "norms"), OWN, ids=str)
def test_a_task_without_values_is_refused_until_it_has_some(method, norms, way, tmp_path):
    model, x = vit(), torch.randn(2, 3, 32, 32)
    late, plain = late_vit(method, norms), copy.deepcopy(model.state_dict())
    if way == "to_empty":
        late.to_empty(device="cpu")
    late.load_state_dict(plain, assign=way == "assign")
    copied = copy.deepcopy(late)
    for each in (late, copied):
        with torch.no_grad():
            with pytest.raises(
                visadapt.VisadaptError, match=r"task 't' was made on the meta device and .* has no values"
            ):
                each(x)
            with visadapt.using(each, None):
                assert torch.equal(each(x), model(x))
    with pytest.raises(visadapt.VisadaptError, match="meta device"):
        visadapt.save(late, "t", tmp_path / "t")
    with pytest.raises(visadapt.VisadaptError, match="meta device"):
        visadapt.merge(late, "t")
    visadapt.inject(model, method, task="t", num_classes=3, norms=norms)
    late.load_state_dict(model.state_dict(), assign=way == "assign")
    for each in (late, copy.deepcopy(late)):
        with torch.no_grad():
            assert torch.equal(each(x), model(x))
    visadapt.save(late, "t", tmp_path / "t")


def test_a_task_is_injected_anew_where_it_had_no_values():
    late, model = late_vit(visadapt.Bottleneck(m=4), "affine"), vit()
    late.to_empty(device="cpu")
    late.load_state_dict(model.state_dict())
    visadapt.remove(late, "t")
    visadapt.inject(late, m=4, task="t", head="copy")
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(late(x), model(x))


def test_a_mixed_batch_of_tasks_that_got_their_values_again():
    model, x = vit(), torch.randn(4, 3, 32, 32)
    for task in "ab":
        visadapt.inject(model, m=4, task=task, num_classes=3)
    state = copy.deepcopy(model.state_dict())
    tasks = list("abba")
    with torch.no_grad(), visadapt.using(model, tasks):
        expected = model(x)
        model.to("meta").to_empty(device="cpu")
        model.load_state_dict(state)
        assert torch.equal(model(x), expected)


def test_shapes_are_told_on_the_meta_device():
    late = late_vit(visadapt.Bottleneck(m=4), "affine")
    assert late(torch.empty(2, 3, 32, 32, device="meta")).shape == (2, 3)
