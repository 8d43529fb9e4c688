"""The prefix cache gives what the whole model gives, from the last stage's work alone."""

import pytest
import timm
import torch
import torchvision
from transformers import BertConfig, BertForSequenceClassification

import visadapt
from tests.models import ZOO
from visadapt.backbone.modules import PREFIX
from visadapt.data import augment
from visadapt.frozen.prefix import Prefix
from visadapt.training import Recipe, evaluate, fit


def late(name):
    torch.manual_seed(0)
    if name == "resnet18":
        model, where, x = torchvision.models.resnet18(), "layer4", torch.randn(10, 3, 64, 64)
    elif name == "vgg11_bn":
        model, where, x = ZOO["timm/vgg11_bn"].make(), slice(-2, None), torch.randn(4, 3, 64, 64)
    elif name == "vit":
        model = timm.create_model("vit_tiny_patch16_224", img_size=64)
        where, x = slice(-1, None), torch.randn(10, 3, 64, 64)
    else:
        config = BertConfig(
            vocab_size=99, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64
        )
        model, where = BertForSequenceClassification(config), slice(-1, None)
        x = {"input_ids": torch.randint(3, 90, (10, 9)), "attention_mask": torch.ones(10, 9, dtype=torch.long)}
        x["attention_mask"][3:, 6:] = 0
    return visadapt.inject(model, m=4, where=where, norms="frozen", num_classes=5, task="t"), x


@pytest.mark.parametrize("name", ["resnet18", "vgg11_bn", "vit", "bert"])
def test_training_from_the_cache_is_training(name):
    model, x = late(name)
    labels = torch.arange(len(next(iter(x.values())) if isinstance(x, dict) else x)) % 5
    model.eval()  # no dropout below the cut
    state = {key: value.clone() for key, value in model.state_dict().items()}
    recipe = Recipe(epochs=2, batch_size=4, lr=1e-2)
    expected = fit(model, "t", (x, labels), recipe=recipe, progress=False, prepare=lambda batch: batch)
    trained = {key: value.clone() for key, value in visadapt.named_parameters(model, "t")}
    model.load_state_dict(state)
    cached = visadapt.cache_prefix(model, "t", x)
    found = fit(model, "t", (cached.rows, labels), recipe=recipe, progress=False, prepare=cached)
    if name != "bert":  # whose upper layers drop at random
        losses = [[epoch.loss for epoch in result.epochs] for result in (found, expected)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
        for key, value in visadapt.named_parameters(model, "t"):
            torch.testing.assert_close(value, trained[key], rtol=1e-3, atol=1e-5)
    cached.prefix.close()
    assert evaluate(model, "t", (x, labels), prepare=lambda batch: batch)["loss"] > 0
    assert not any(PREFIX in module.__dict__ for module in model.modules())


def test_the_prefix_is_not_run_again():
    model, x = late("resnet18")
    ran = []
    model.layer2[0].conv1.register_forward_hook(lambda *_: ran.append("layer2"))
    model.layer4[0].conv1.register_forward_hook(lambda *_: ran.append("layer4"))
    cached = visadapt.cache_prefix(model, "t", x)
    assert cached.prefix.path == "layer3.1"  # its output is that of layer3
    ran.clear()
    with torch.no_grad():
        out = cached(torch.tensor([3, 1])).resume()
    assert ran == ["layer4"]
    cached.prefix.close()
    model.eval()
    assert torch.equal(out.argmax(1), model(x[[3, 1]]).argmax(1))


def test_a_file_is_reused_only_for_the_same(tmp_path, monkeypatch):
    model, x = late("resnet18")
    file = tmp_path / "features"
    first = visadapt.cache_prefix(model, "t", x, file=file)
    kept = first.features.clone()
    first.prefix.close()
    runs = []
    monkeypatch.setattr(Prefix, "compute", lambda self, inputs, run=Prefix.compute: runs.append(1) or run(self, inputs))
    again = visadapt.cache_prefix(model, "t", x, file=file)
    again.prefix.close()
    assert len(runs) == 2  # the checks on the first samples
    assert torch.equal(again.features, kept)
    other = visadapt.cache_prefix(model, "t", x + 1, file=file)
    other.prefix.close()
    assert not torch.equal(other.features, kept)
    with torch.no_grad():
        model.layer1[0].conv1.weight.mul_(1.1)
    changed = visadapt.cache_prefix(model, "t", x, file=file)
    changed.prefix.close()
    assert not torch.equal(changed.features, kept)


def test_views_of_an_augmentation():
    model, _ = late("resnet18")
    x = torch.randint(0, 255, (6, 3, 32, 32), dtype=torch.uint8)
    make = {"prepare": lambda batch: batch.float() / 255, "augment": augment, "views": 3}
    cached = visadapt.cache_prefix(model, "t", x, **make)
    cached.prefix.close()
    assert cached.features.shape[:2] == (3, 6)
    assert not torch.equal(cached.features[0], cached.features[1])
    again = visadapt.cache_prefix(model, "t", x, **make)
    again.prefix.close()
    assert torch.equal(again.features, cached.features)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (
            lambda: visadapt.inject(torchvision.models.resnet18(), m=4, task="t", where="conv1", norms="frozen"),
            {},
            "no prefix to keep",
        ),
        (lambda: late("resnet18")[0], {"limit": 1000}, "more than limit"),
        (lambda: late("resnet18")[0], {"views": 2}, "needs an augment"),
        (lambda: late("resnet18")[0], {"views": 0}, "1 or more"),
        (lambda: late("resnet18")[0], {"file": "/nowhere/at/all"}, "cannot keep"),
    ],
)
def test_what_cannot_be_kept_is_refused(make, options, message):
    model = make()
    classes = [type(module) for module in model.modules()]
    with pytest.raises(visadapt.VisadaptError, match=message):
        visadapt.cache_prefix(model, "t", torch.randn(4, 3, 64, 64), **options)
    assert [type(module) for module in model.modules()] == classes


def test_what_is_not_one_tensor_per_sample_is_named():
    model = visadapt.inject(torchvision.models.resnet18(), m=4, task="t", where="layer4", norms="frozen")
    given = {"x": torch.randn(4, 3, 64, 64), "use_cache": False}
    with pytest.raises(visadapt.VisadaptError, match=r"inputs\['use_cache'\] = False"):
        visadapt.cache_prefix(model, "t", given)
    with pytest.raises(visadapt.VisadaptError, match="got list"):
        visadapt.cache_prefix(model, "t", [1])
