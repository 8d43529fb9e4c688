"""The catalogue: contenders by name."""

import pytest

from tests.experiments.conftest import small
from visadapt import VisadaptError
from visadapt.experiments import contender
from visadapt.experiments.catalogue import _METHODS
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
    made = contender(name, epochs=5)
    assert made.method == method
    assert made.name == name
    assert made.recipe.epochs == 5
    assert len(made.rates) > 1
    assert made.recipe.lr in made.rates


@pytest.mark.parametrize(
    ("said", "name"),
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
def test_a_contender_has_one_name_however_it_is_asked_for(said, name) -> None:
    assert contender(said) == contender(name)
    assert contender(said).name == name


# at such narrow layers a default width is too much, and is said to be
@pytest.mark.filterwarnings("ignore:.*choose a smaller m:UserWarning")
@pytest.mark.parametrize("name", sorted(set(_METHODS) - {"adaptformer"}))
def test_every_method_for_convolutions_can_be_put_in(name) -> None:
    problem = small()
    model = contender(name).put(problem, 0)
    assert "digits" in model.__dict__["_visadapt"].tasks


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("botleneck m=8", "no method 'botleneck'; did you mean 'bottleneck'"),
        ("bottleneck n=8", "Bottleneck has no option 'n'"),
        ("bottleneck m=0", "m must be a positive integer"),
        ("", "no method ''"),
    ],
)
def test_what_is_refused(name, said) -> None:
    with pytest.raises(VisadaptError, match=said):
        contender(name)
