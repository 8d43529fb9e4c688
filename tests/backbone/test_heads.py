"""Heads: each task its own, as wide as it needs; the backbone keeps its."""

import pytest
import torch
from torch import nn

import visadapt
from tests.models import ZOO, answer, output, stir
from visadapt import VisadaptError
from visadapt.backbone.heads import find_head

FINALS = {"tiny/vgg_bn": "classifier.6", "timm/vgg11_bn": "head.fc"}


def test_every_member_can_have_heads_of_its_own(model, member, inputs) -> None:
    bare = answer(model, inputs)
    visadapt.inject(model, m=2, task="seven", num_classes=7)
    visadapt.inject(model, m=2, task="one", num_classes=1)
    visadapt.inject(model, m=2, task="copy", head="copy")
    visadapt.inject(model, m=2, task="frozen", head="frozen")
    stir(model, "seven")
    assert answer(model, inputs, "seven").shape == (2, 7)
    assert answer(model, inputs, "one").shape == (2, 1)
    assert torch.equal(answer(model, inputs, "copy"), bare)
    assert torch.equal(answer(model, inputs, "frozen"), bare)
    assert torch.equal(answer(model, inputs, None), bare)
    assert bare.shape == (2, member.width)
    widths = {task: spec.num_classes for task, spec in visadapt.tasks(model).items()}
    assert widths == {"seven": 7, "one": 1, "copy": member.width, "frozen": None}
    stir(model, "copy")
    assert not torch.equal(answer(model, inputs, "copy"), bare)
    assert torch.equal(answer(model, inputs, "frozen"), bare)


def test_without_num_classes_only_a_text_classifiers_head_is_trained(model, member) -> None:
    """transformers makes a new head with every …ForSequenceClassification; an image model comes with a trained one."""
    visadapt.inject(model, m=2)
    head = find_head(model)
    named = [name for name, _ in visadapt.named_parameters(model, "default") if ".head." in name]
    assert visadapt.tasks(model)["default"].head == ("copy" if member.text else "frozen")
    assert bool(named) == member.text
    assert {name.partition(".head.")[0] for name in named} == (set(head.modules) if member.text else set())


@pytest.mark.parametrize(
    "member",
    ["tiny/vgg_bn", "torchvision/vgg11", "torchvision/vgg16", "torchvision/vgg16_bn"],
    indirect=True,
    scope="session",
)
def test_vgg_keeps_the_other_linears_of_its_classifier(model, inputs) -> None:
    seen = []
    handles = [model.classifier[i].register_forward_hook(lambda m, a, out: seen.append(out)) for i in (0, 3)]
    answer(model, inputs)
    visadapt.inject(model, visadapt.Bottleneck(m=2), num_classes=5)
    names = [name for name, _ in visadapt.named_parameters(model, "default") if name.startswith("classifier")]
    assert names == ["classifier.6.head.weight", "classifier.6.head.bias"]
    answer(model, inputs, "default")
    for handle in handles:
        handle.remove()
    assert torch.equal(seen[0], seen[2])
    assert torch.equal(seen[1], seen[3])


@pytest.mark.parametrize(
    "name",
    ["vgg11", "vgg13_bn", "vgg16", "vgg19", "resnet18", "resnet152", "resnext101_64x4d", "wide_resnet101_2"],
)
def test_the_head_of_torchvisions_full_sized_models(name) -> None:
    """On the meta device: structure only, no memory."""
    import torchvision

    with torch.device("meta"):
        model = torchvision.models.get_model(name, weights=None)
        visadapt.inject(model, m=2, norms="frozen", num_classes=5)
    final = "classifier.6" if name.startswith("vgg") else "fc"
    width = 4096 if name.startswith("vgg") else model.fc.in_features
    assert visadapt.summary(model)["default"].head == 5 * width + 5
    assert {name for name, _ in visadapt.named_parameters(model, "default") if ".head." in name} == {
        f"{final}.head.weight",
        f"{final}.head.bias",
    }


@pytest.mark.parametrize("member", [n for n, m in ZOO.items() if m.text], indirect=True, scope="session")
def test_all_of_a_transformers_head_is_the_tasks(model, inputs) -> None:
    """RoBERTa's and ELECTRA's dense layer and DistilBERT's pre-classifier are drawn anew for every problem."""
    visadapt.inject(model, m=2, num_classes=7)
    base = model.base_model_prefix
    expected = {name for name, _ in model.named_parameters() if "visadapt" not in name and not name.startswith(base)}
    found = {
        name.replace(".head", "", 1) for name, _ in visadapt.named_parameters(model, "default") if ".head." in name
    }
    assert found == expected
    assert answer(model, inputs, "default").shape == (2, 7)


@pytest.mark.parametrize("member", ["transformers/bert", "transformers/roberta"], indirect=True, scope="session")
def test_a_new_transformers_head_is_drawn_at_the_configs_scale(model) -> None:
    visadapt.inject(model, m=2, num_classes=500)
    final = find_head(model).final
    weight = next(
        p
        for n, p in visadapt.named_parameters(model, "default")
        if n.endswith(final.split(".")[-1] + ".weight") or n == f"{final}.head.weight"
    )
    assert weight.std().item() == pytest.approx(model.config.initializer_range, rel=0.1)


def test_a_heads_hooks_and_place_stay(tiny, image) -> None:
    """The head is replaced within its own module, so what looks for ``model.fc`` still finds it."""
    features = []
    tiny.fc.register_forward_pre_hook(lambda module, args: features.append(args[0]))
    visadapt.inject(tiny, m=2, num_classes=7)
    assert isinstance(tiny.fc, nn.Linear)
    assert tiny.fc.out_features == 10
    assert tiny(image).shape == (2, 7)
    assert features[0].shape == (2, 32)


def test_a_home_made_model_that_names_its_head_as_others_do() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(4, 6)
            self.score = nn.Linear(6, 2, bias=False)

        def forward(self, x):
            return self.score(self.body(x))

    net = visadapt.inject(Net(), visadapt.Bottleneck(m=1), where="body", example=torch.randn(2, 4), num_classes=3)
    assert net(torch.randn(5, 4)).shape == (5, 3)
    assert "score.head.bias" not in dict(visadapt.named_parameters(net, "default"))


def test_a_convolution_can_be_the_head(image) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Conv2d(3, 6, 3)
            self.classifier = nn.Sequential(nn.Dropout(), nn.Conv2d(6, 10, 1), nn.ReLU())

        def forward(self, x):
            return self.classifier(self.body(x)).mean((2, 3))

    net = Net().eval()
    visadapt.inject(net, m=2, where="body", example=image, num_classes=4)
    assert net(image).shape == (2, 4)
    assert visadapt.active(net) == "default"
    with visadapt.using(net, None):
        assert net(image).shape == (2, 10)


class Auxiliary(nn.Module):
    """Has a second head in train mode, as GoogLeNet has.

    Args:
        how: what comes out in train mode.
    """

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.stem, self.body = nn.Conv2d(3, 6, 3), nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.ReLU())
        self.fc, self.aux = nn.Linear(6, 10), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 10))
        self.box = nn.Linear(6, 4)

    def forward(self, x, targets=None):
        x = self.stem(x)
        out = self.fc((x + self.body(x)).mean((2, 3)))
        if not self.training or self.how == "unused":
            return out
        aux = self.aux(x) if self.how != "boxes" else self.box(x.mean((2, 3)))
        if self.how == "sum":
            return out + 0.3 * aux
        if self.how == "loss":
            return nn.functional.cross_entropy(out, targets) + nn.functional.cross_entropy(aux, targets)
        return {"out": out, "aux": aux} if self.how == "dict" else (out, aux)


@pytest.mark.parametrize("how", ["tuple", "dict", "sum", "boxes", "unused"])
@pytest.mark.parametrize("where", [None, "body"])
def test_auxiliary_heads_follow_the_number_of_classes(image, how, where) -> None:
    net = Auxiliary(how)
    visadapt.inject(net, m=2, where=where, example=image, num_classes=3)
    out = net.train()(image)
    shapes = [o.shape for o in (out.values() if isinstance(out, dict) else out if isinstance(out, tuple) else [out])]
    assert shapes == [(2, 3)] * (1 + (how in ("tuple", "dict"))) + [(2, 4)] * (how == "boxes")
    assert not any("box" in name for name, _ in visadapt.named_parameters(net, "default"))


def test_an_auxiliary_head_that_is_not_seen_is_refused(image) -> None:
    net = Auxiliary("loss")
    with pytest.raises(VisadaptError, match=r"does not use aux\.2, of the same width, in eval mode"):
        visadapt.inject(net, m=2, example=image, num_classes=3)
    visadapt.inject(net, m=2, example=image, num_classes=3, head=["fc", "aux.2"])
    net.train()(image, torch.tensor([0, 2])).backward()


def test_a_model_is_run_in_train_mode_only_if_it_did_not_use_a_layer(image, monkeypatch) -> None:
    modes = []
    forward = Auxiliary.forward
    monkeypatch.setattr(Auxiliary, "forward", lambda self, x: (modes.append(self.training), forward(self, x))[1])
    for used in (False, True):
        net = Auxiliary("tuple")
        if used:
            net.aux = net.box = nn.Identity()
        visadapt.inject(net, m=2, example=image, num_classes=3)
        assert (True in modes) is not used
        modes.clear()


def test_no_head_is_needed_where_none_is_asked_for(image) -> None:
    import timm

    features = timm.create_model("resnet18", channels=(8, 16, 24, 32), num_classes=0).eval()
    expected = features(image)
    visadapt.inject(features, m=2)
    assert torch.equal(features(image), expected)
    assert visadapt.tasks(features)["default"].head == "frozen"
    for request in ({"num_classes": 3}, {"head": "copy"}):
        with pytest.raises(VisadaptError, match="no head found in ResNet"):
            visadapt.inject(features, m=2, task="b", **request)


def test_labels_are_kept_with_the_task(tiny) -> None:
    visadapt.inject(tiny, m=2, num_classes=2, labels=["cat", "dog"])
    assert visadapt.tasks(tiny)["default"].labels == ("cat", "dog")


@pytest.mark.parametrize("where", ["fc", ["layer1", "fc"]])
def test_an_adapter_inside_a_head_that_the_task_replaces_is_refused(tiny, image, where) -> None:
    """It would see logits of another width, or never run at all."""
    with pytest.raises(VisadaptError, match=r"fc is the head that task 'default' replaces"):
        visadapt.inject(tiny, m=2, where=where, example=image, num_classes=7)
    visadapt.inject(tiny, m=2, where=where, example=image)
    assert output(tiny, {"x": image}).shape == (2, 10)


def test_so_is_one_inside_a_transformers_head() -> None:
    model = ZOO["transformers/electra"].make()
    with pytest.raises(VisadaptError, match=r"classifier\.dense is in the head that task 'default' replaces"):
        visadapt.inject(model, m=2, where="classifier.dense")


def test_a_task_that_the_model_itself_hosts_is_no_part_of_its_head() -> None:
    model = ZOO["transformers/bert"].make()
    before = find_head(model)
    whole = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("classifier."))
    visadapt.inject(model, visadapt.METHODS["Full"](), task="all", num_classes=4, norms="full")
    assert find_head(model) == before
    assert visadapt.summary(model).backbone == whole
    assert visadapt.summary(model)["all"].fraction == 1
    visadapt.inject(model, m=4, task="next", num_classes=5)
    assert not [name for name, _ in visadapt.named_parameters(model, "next") if name.startswith("visadapt")]


@pytest.mark.parametrize("member", [n for n, m in ZOO.items() if m.text], indirect=True, scope="session")
def test_transformers_own_loss_is_the_tasks(model, inputs, lent) -> None:
    """``labels=`` gives the loss of the task in use, whatever width the backbone's config says."""
    visadapt.inject(model, m=2, task="seven", num_classes=7)
    visadapt.inject(model, m=2, task="score", num_classes=1)
    labels = torch.tensor([6, 2])
    with visadapt.using(model, "seven"):
        out = model(**inputs, labels=labels)
        torch.testing.assert_close(out.loss, nn.functional.cross_entropy(out.logits, labels))
    with visadapt.using(model, "score"):
        out = model(**inputs, labels=labels.float())
        torch.testing.assert_close(out.loss, nn.functional.mse_loss(out.logits[:, 0], labels.float()))
    with visadapt.using(model, None):
        assert (model.config.num_labels, model.config.problem_type) == (3, None)
    visadapt.eject(model)
    assert model.num_labels == model.config.num_labels == 3
