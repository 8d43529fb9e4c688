"""Batches of mixed tasks that enter by another method than the whole model's forward."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import visadapt
from tests.models import enliven, stir
from visadapt import Bottleneck, Full, Ladder, LoRA, VisadaptError, using
from visadapt.backbone.batch import leaves

TASKS = ["b", None, "a", "b"]
IMAGES = (4, 3, 32, 32)
VISION = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
VISION |= {"image_size": 32, "patch_size": 16}
WORDS = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
WORDS |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def vit():
    return timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=16, num_heads=2, num_classes=5)


def clip():
    return transformers.CLIPModel(transformers.CLIPConfig(vision_config=VISION, text_config=WORDS))


def t5():
    config = transformers.T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    return transformers.T5ForConditionalGeneration(config)


def bert():
    return transformers.BertForSequenceClassification(transformers.BertConfig(**WORDS))


class Steps(nn.Module):
    """A network that is called in steps, by methods of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 8, 8), nn.BatchNorm2d(8)
        self.body = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        self.fc = nn.Linear(8, 5)
        self.calls = 0

    def embed(self, x: Tensor, *, scale: float = 1.0) -> dict[str, Tensor]:
        self.calls += 1
        tokens = self.norm(self.stem(x)).flatten(2).transpose(1, 2)
        return {"tokens": self.body(tokens) * scale}

    def similarity(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.embed(x)["tokens"].mean(1)
        return features, features @ features.T

    def predict(self, x: Tensor) -> Tensor:
        return self(x).softmax(-1)

    def count(self) -> int:
        return self.calls

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.embed(x)["tokens"].mean(1))


def ready(make, method=None):
    torch.manual_seed(0)
    model = enliven(make()).eval()
    for seed, task in enumerate("ab"):
        visadapt.inject(model, method or Bottleneck(m=3), task=task)
        stir(model, task, seed + 1)
    return model


def texts() -> Tensor:
    return torch.randint(3, 50, (4, 6))


ENTRIES = {
    "features": (vit, torch.randn(IMAGES), lambda m, x: m.forward_features(x)),
    "head": (vit, torch.randn(4, 5, 16), lambda m, x: m.forward_head(x)),
    "intermediates": (vit, torch.randn(IMAGES), lambda m, x: m.forward_intermediates(x)[1]),
    "layers in a loop": (vit, torch.randn(4, 5, 16), lambda m, x: [x := block(x) for block in m.blocks]),
    "towers": (clip, torch.randn(IMAGES), lambda m, x: m.get_image_features(x)),
    "a tower": (clip, torch.randn(IMAGES), lambda m, x: m.vision_model(pixel_values=x)),
    "encoder": (t5, texts(), lambda m, x: m.encoder(input_ids=x)),
    "parts": (bert, texts(), lambda m, x: m.bert.encoder(m.bert.embeddings(x))),
    "own methods": (Steps, torch.randn(IMAGES), lambda m, x: m.embed(x, scale=2.0)),
    "around forward": (Steps, torch.randn(IMAGES), lambda m, x: m.predict(x)),
    "layers by hand": (Steps, torch.randn(IMAGES), lambda m, x: m.body(m.norm(m.stem(x)).flatten(1)[:, :8])),
}


def tensors(tree) -> list[Tensor]:
    return [leaf for _, leaf in leaves(tree) if isinstance(leaf, Tensor) and leaf.ndim]


def check(model, call, x) -> None:
    """Each sample gets what its task alone gives it, in the first batch and later ones."""
    alone = []
    for row, task in enumerate(TASKS):
        with using(model, task):
            alone.append(tensors(call(model, x[row : row + 1])))
    assert not torch.allclose(alone[0][-1], alone[2][-1])
    for _ in range(2):
        with using(model, TASKS):
            found = tensors(call(model, x))
        for row, own in enumerate(alone):
            for mixed, expected in zip(found, own, strict=True):
                torch.testing.assert_close(mixed[row : row + 1], expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ENTRIES)
def test_each_sample_gets_what_its_task_alone_gives_whatever_method_is_called(name):
    make, x, call = ENTRIES[name]
    check(ready(make), call, x)


@torch.no_grad()
@pytest.mark.parametrize("method", [LoRA(r=2), Full(), Ladder(m=3)], ids=str)
def test_other_methods_in_two_steps(method):
    check(ready(vit, method), lambda m, x: m.forward_head(m.forward_features(x)), torch.randn(IMAGES))


def test_gradients():
    model, x = ready(vit).train(), torch.randn(IMAGES)
    trained = [p for task in "ab" for p in visadapt.parameters(model, task)]
    found = []
    for calls in ([(slice(0, 4), TASKS)], [(slice(row, row + 1), task) for row, task in enumerate(TASKS)]):
        model.zero_grad()
        for rows, tasks in calls:
            with using(model, tasks):
                out = model.forward_features(x[rows])
            if out.requires_grad:
                out.square().sum().backward()
        found.append([torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in trained])
    assert any(g.any() for g in found[0])
    for mixed, alone in zip(*found, strict=True):
        torch.testing.assert_close(mixed, alone, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_what_cannot_be_divided_is_refused_with_the_reason():
    model, x = ready(Steps), torch.randn(IMAGES)
    with using(model, TASKS):
        with pytest.raises(VisadaptError, match=r"similarity .*outside of the model.* has several axes of samples"):
            model.similarity(x)
        with pytest.raises(VisadaptError, match=r"embed .*4 tasks .* batch of 3"):
            model.embed(x[:3])
        with pytest.raises(VisadaptError, match=r"body\.2 .*4 tasks .* batch of 3"):
            model.body[2](torch.randn(3, 8))
        assert model.count() == model.calls
    visadapt.remove(model, "b")
    with pytest.raises(VisadaptError, match="no task 'b'"), using(model, TASKS):
        pass


@torch.no_grad()
def test_a_removed_task_and_the_deciders_choice_are_refused():
    model, x = ready(Steps), torch.randn(IMAGES)
    with using(model, TASKS):
        model.embed(x)
        visadapt.remove(model, "b")
        with pytest.raises(VisadaptError, match="'b' was removed"):
            model.embed(x)


@torch.no_grad()
def test_copies_take_batches_and_ejected_models_are_what_they_were():
    plain = enliven(Steps()).eval()
    classes = {path: type(module) for path, module in plain.named_modules()}
    model, x = ready(lambda: plain), torch.randn(IMAGES)
    with using(model, TASKS):
        expected = model.embed(x)["tokens"]
    twin = copy.deepcopy(model)
    with using(twin, TASKS):
        assert torch.equal(twin.embed(x)["tokens"], expected)
    with using(model, ["a", "b"]), pytest.raises(VisadaptError, match="2 tasks"):
        model.embed(x)
    visadapt.eject(model)
    assert {path: type(module) for path, module in model.named_modules()} == classes
    assert not any("visadapt" in key for module in model.modules() for key in vars(module))


@torch.no_grad()
def test_tokens_are_not_taken_for_samples():
    model = ready(Steps)
    inside = ready(lambda: nn.Sequential(nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0), nn.Linear(16, 3)))
    with using(model, TASKS):
        for shape in ((8, 4, 8), (4, 4, 8)):
            # windows of four tokens, or four samples of four: a linear layer cannot tell
            with pytest.raises(VisadaptError, match="samples may lie along axis"):
                model.body(torch.randn(shape))
        assert model.body(torch.randn(4, 8, 8)).shape == (4, 8, 8)
    for length in (4, 6):
        # attention mixes the tokens
        x = torch.randn(length, 4, 16)
        alone = []
        for row, task in enumerate(TASKS):
            with using(inside, task):
                alone.append(inside[0](x[:, row : row + 1]))
        with using(inside, TASKS):
            torch.testing.assert_close(inside[0](x), torch.cat(alone, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_of_an_entry(reentrant):
    found = []
    for checkpointing in (False, True):
        model = ready(vit)
        x = torch.linspace(-1, 1, 4 * 3 * 32 * 32).view(IMAGES).requires_grad_()
        with using(model, TASKS):
            if checkpointing:
                out = checkpoint(model.forward_features, x, use_reentrant=reentrant)
            else:
                out = model.forward_features(x)
        with using(model, "a"):
            out.square().sum().backward()
        found.append([p.grad for task in "ab" for p in visadapt.parameters(model, task) if p.grad is not None])
    assert found[0]
    for own, other in zip(*found, strict=True):
        assert torch.equal(own, other)


@torch.no_grad()
def test_a_comparison_of_all_samples_is_refused_by_its_name():
    model = ready(clip)
    with (
        using(model, TASKS),
        pytest.raises(VisadaptError, match=r"logits_per_(image|text) has several axes"),
    ):
        model(input_ids=texts(), pixel_values=torch.randn(IMAGES))
