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
