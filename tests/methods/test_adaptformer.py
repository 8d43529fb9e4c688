import pytest
import torch
from torch.nn import functional as F

import visadapt as v
from tests.models import ZOO, answer, stir


def branch(part, x):
    z = F.relu(F.linear(x, part.down.weight, part.down.bias))
    return 0.1 * F.linear(z, part.up.weight, part.up.bias)


def test_beside_the_ffn_of_bert() -> None:
    """The FFN is two modules there, of which the second adds: LayerNorm(FFN(x) + s·adapter(x) + x)."""
    model = ZOO["transformers/bert"].make()
    v.inject(model, v.AdaptFormer(m=4), norms="frozen", head="frozen")
    stir(model, "default")
    layer = model.bert.encoder.layer[0]
    part = layer.output.visadapt["default"]["adaptformer"]
    x = torch.randn(2, 5, 32)
    with torch.no_grad():
        h = layer.output.dense(layer.intermediate(x))
        expected = layer.output.LayerNorm(h + branch(part, x) + x)
        torch.testing.assert_close(layer.feed_forward_chunk(x), expected)


def test_beside_the_ffn_of_distilbert_and_vit() -> None:
    distilbert = ZOO["transformers/distilbert"].make()
    vit = (
        pytest.importorskip("timm").create_model("vit_tiny_patch16_224", depth=1, num_classes=4, init_values=0.1).eval()
    )
    for model, path, width in ((distilbert, "distilbert.transformer.layer.0.ffn", 32), (vit, "blocks.0.mlp", 192)):
        v.inject(model, v.AdaptFormer(m=4), norms="frozen", head="frozen")
        stir(model, "default")
        mlp = model.get_submodule(path)
        x = torch.randn(2, 5, width)
        with torch.no_grad():
            with v.using(model, None):
                bare = mlp(x)
            torch.testing.assert_close(mlp(x), bare + branch(mlp.visadapt["default"]["adaptformer"], x))


class Swapped(torch.nn.Module):
    """An MLP whose layers are registered in another order than it calls them."""

    def __init__(self, inputs, hidden, outputs) -> None:
        super().__init__()
        self.fc2 = torch.nn.Linear(hidden, outputs)
        self.fc1 = torch.nn.Linear(inputs, hidden)

    def forward(self, x):
        return self.fc2(F.relu(self.fc1(x)))


class Widening(torch.nn.Module):
    """A block whose MLP widens its input for the next stage, as MViT's does."""

    def __init__(self, inputs, hidden, outputs) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(inputs)
        self.project = torch.nn.Linear(inputs, outputs)
        swapped = hidden > max(inputs, outputs)
        chain = torch.nn.Linear(inputs, hidden), torch.nn.ReLU(), torch.nn.Linear(hidden, outputs)
        self.mlp = Swapped(inputs, hidden, outputs) if swapped else torch.nn.Sequential(*chain)

    def forward(self, x):
        x = self.norm(x)
        return self.project(x) + self.mlp(x)


@pytest.mark.parametrize("widths", [(4, 16, 8), (4, 8, 8), (8, 8, 4), (4, 4, 8)])
def test_the_input_of_the_mlp_need_not_be_as_wide_as_its_output(widths) -> None:
    x, model = torch.randn(2, 5, widths[0]), torch.nn.Sequential(Widening(*widths))
    before = answer(model, {"input": x})
    v.inject(model, v.AdaptFormer(m=3), where="*.mlp", norms="frozen", head="frozen", example=x)
    assert torch.equal(answer(model, {"input": x}, "default"), before)
    stir(model, "default")
    with torch.no_grad(), v.using(model, None):
        z = model[0].norm(x)
        bare = model[0].mlp(z)
    torch.testing.assert_close(model[0].mlp(z), bare + branch(model[0].mlp.visadapt["default"]["adaptformer"], z))


@pytest.mark.parametrize("kind", ["Albert", "IBert"])
def test_no_module_that_is_only_a_part_of_the_mlp_is_taken_for_it(kind) -> None:
    """ALBERT's ``ffn`` is the first of two linears; I-BERT passes scales between its tensors."""
    transformers = pytest.importorskip("transformers")
    options = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    config = getattr(transformers, f"{kind}Config")(**options, vocab_size=50, pad_token_id=0)
    model = getattr(transformers, f"{kind}ForSequenceClassification")(config).eval()
    with pytest.raises(v.VisadaptError, match="no MLP found at mlp:"):
        v.inject(model, v.AdaptFormer(m=3))
    v.inject(model, v.Bottleneck(m=3), where="mlp")


def test_width_by_m_and_budget() -> None:
    model = ZOO["transformers/bert"].make()
    v.inject(model, v.AdaptFormer(), budget=0.05, norms="frozen", head="frozen")
    summary = v.summary(model)["default"]
    assert 0.03 < summary.fraction <= 0.05
    v.inject(model, "AdaptFormer", m=3, task="three", norms="frozen", head="frozen")
    assert v.summary(model)["three"].adapters == 2 * (2 * 32 * 3 + 32 + 3)


def test_what_is_refused() -> None:
    for options in ({"m": 0}, {"scale": 0}, {"dropout": 1.0}):
        with pytest.raises(v.VisadaptError, match=next(iter(options))):
            v.AdaptFormer(**options)
    model = ZOO["transformers/bert"].make()
    with pytest.raises(v.VisadaptError, match="no MLP found at query:bert"):
        v.inject(model, v.AdaptFormer(), where="query")
    before = answer(model, ZOO["transformers/bert"].inputs())
    v.inject(model, v.AdaptFormer(m=2))
    assert torch.equal(answer(model, ZOO["transformers/bert"].inputs(), "default"), before)
    with pytest.raises(v.VisadaptError, match="cannot be merged"):
        v.merge(model)
