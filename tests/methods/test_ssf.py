import pytest
import torch
import transformers
from torch import nn

import visadapt as v
from tests.models import ZOO, answer
from visadapt.backbone.site import Site


@pytest.mark.parametrize("layout", ["NCHW", "NHWC", "NLC"])
def test_the_equation(layout) -> None:
    part = v.SSF(init_std=0.5).build(Site("s", "block", 3, layout, 0), nn.Identity())
    x = torch.randn({"NCHW": (2, 3, 4, 5), "NHWC": (2, 4, 5, 3), "NLC": (2, 4, 3)}[layout])
    shape = (3, 1, 1) if layout == "NCHW" else (3,)
    torch.testing.assert_close(part(x), x * part.gamma.view(shape) + part.beta.view(shape))
    assert part.as_affine()[0] is part.gamma


def test_it_stands_after_every_layer_outside_the_head() -> None:
    for name in ("tiny/resnet", "transformers/distilbert"):
        model = ZOO[name].make()
        v.inject(model, v.SSF(), num_classes=4, norms="frozen")
        hosts = {site.partition(":")[2] for site in v.tasks(model)["default"].placements[0].sites}
        layers = (nn.Conv2d, nn.Linear, nn.BatchNorm2d, nn.LayerNorm)
        wanted = {n for n, m in model.named_modules() if isinstance(m, layers) and "visadapt" not in n}
        assert hosts == {n for n in wanted if n not in ("fc", "classifier", "pre_classifier")}


@pytest.mark.parametrize(("where", "layer"), [("conv", nn.Conv2d), ("norm", nn.BatchNorm2d)])
def test_where_takes_one_sort_of_layer(where, layer, tiny, image) -> None:
    assert {type(tiny.get_submodule(s.host)) for s in v.sites(tiny, where)} == {layer}
    with pytest.raises(v.VisadaptError, match="where='linear' matches no"):
        v.sites(tiny, "linear")
    before = answer(tiny, {"x": image}, None)
    v.inject(tiny, v.SSF(), where=where)
    assert torch.equal(answer(tiny, {"x": image}, "default"), before)


def test_a_norm_of_what_was_not_computed_from_the_input() -> None:
    """Of DeBERTa's relative positions, which a LayerNorm scales, the weight tells the channels."""
    model = transformers.DebertaV2ForSequenceClassification(
        transformers.DebertaV2Config(
            vocab_size=60,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=24,
            relative_attention=True,
            pos_att_type=["p2c", "c2p"],
            position_buckets=4,
            norm_rel_ebd="layer_norm",
            share_att_key=True,
        )
    ).eval()
    v.inject(model, v.SSF(), norms="frozen")
    assert ("deberta.encoder.LayerNorm", "NLC") in {(site.host, site.layout) for site in v.sites(model, "op")}
    for task in ("a", "b"):
        v.inject(model, v.SSF(init_std=0.5), task=task)
    ids = torch.randint(5, 50, (3, 7))
    with torch.no_grad():
        alone = []
        for row, task in enumerate(("b", "a", "b")):
            with v.using(model, task):
                alone.append(model(ids).logits[row])
        with v.using(model, ["b", "a", "b"]):
            torch.testing.assert_close(model(ids).logits, torch.stack(alone))


def test_options_are_checked() -> None:
    with pytest.raises(v.VisadaptError, match="init_std"):
        v.SSF(init_std=0.0)
