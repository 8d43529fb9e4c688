"""The catalogue: contenders by name."""

import pytest

import visadapt
from tests.experiments.conftest import small
from visadapt import VisadaptError
from visadapt.experiments import contender
from visadapt.experiments.catalogue import _METHODS, is_adapter
from visadapt.methods import Bottleneck, Full, LoRA, Norms, TopLayers


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("bottleneck m=8", Bottleneck(8)),
        ("bottleneck m=8 activation=None", Bottleneck(8, activation=None)),
        ("bottleneck m=0.25 activation=relu", Bottleneck(0.25, activation="relu")),
        ("lora", LoRA()),
        ("norms only", Norms()),
        ("top layers n=2", TopLayers(2)),
        ("full fine-tuning", Full()),
    ],
)
def test_a_name_is_a_method_and_its_options(name, method) -> None:
    built = contender(name, epochs=5)
    assert built.method == method
    assert built.name == name
    assert built.recipe.epochs == 5
    assert len(built.rates) > 1
    assert built.recipe.lr in built.rates


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("full", "full fine-tuning"),
        ("Full  fine-tuning", "full fine-tuning"),
        ("norms", "norms only"),
        ("Linear probe", "linear probe"),
        ("linear", "linear probe"),
        ("toplayers n=1", "top layers n=1"),
        ("conv-adapter", "convadapter"),
        ("activation=None Bottleneck m=8", "bottleneck m=8 activation=None"),
    ],
)
def test_an_alias_gives_the_contender_of_the_canonical_name(alias, name) -> None:
    assert contender(alias) == contender(name)
    assert contender(alias).name == name


@pytest.mark.parametrize(
    ("name", "canonical", "where", "norms"),
    [
        ("lora r=2", "lora r=2", None, "affine"),
        ("lora where=conv r=2", "lora r=2 where=conv", "conv", "affine"),
        ("norms=full lora where=block,conv3x3", "lora where=block,conv3x3 norms=full", ["block", "conv3x3"], "full"),
        ("bottleneck where=3 m=8", "bottleneck m=8 where=3", 3, "affine"),
    ],
)
def test_a_name_says_where_and_which_norms(name, canonical, where, norms) -> None:
    built = contender(name)
    assert (built.name, built.where, built.norms) == (canonical, where, norms)
    assert contender(canonical) == built


def test_a_contender_that_names_its_sites_stands_there() -> None:
    model = contender("lora r=2 where=conv").put(small(), 0)
    everywhere = visadapt.summary(model)["digits"].sites
    assert everywhere > visadapt.summary(contender("lora r=2").put(small(), 0))["digits"].sites


# default widths are too large for such narrow layers, and warn
@pytest.mark.filterwarnings("ignore:.*choose a smaller m:UserWarning")
@pytest.mark.parametrize("name", sorted(set(_METHODS) - {"adaptformer", "colora"}))
def test_every_method_for_convolutions_can_be_injected(name) -> None:
    problem = small()
    model = contender(name).put(problem, 0)
    assert "digits" in model.__dict__["_visadapt"].tasks


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("botleneck m=8", "no contender 'botleneck'; did you mean 'bottleneck'"),
        ("bottleneck n=8", "Bottleneck has no option 'n'"),
        ("bottleneck m=0", "m must be a positive integer"),
        ("lora norms=ful", "no norms 'ful'; did you mean 'full'"),
        ("", "no contender ''"),
    ],
)
def test_a_wrong_name_or_option_is_refused(name, message) -> None:
    with pytest.raises(VisadaptError, match=message):
        contender(name)


def test_an_adapter_is_told_from_a_baseline_by_its_name() -> None:
    names = {contender(name).name for name in _METHODS}
    baselines = {"linear probe", "norms only", "biases", "top layers", "full fine-tuning"}
    assert {name for name in names if not is_adapter(name)} == baselines
    assert not is_adapter("top layers n=2")
    assert not is_adapter("full fine-tuning, three times the epochs")
