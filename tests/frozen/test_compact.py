"""Lean models whose frozen weights are kept in fewer bytes: right within rounding, smaller, and exactly undone."""

import copy
import pickle
import threading
from functools import cache

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2ForSequenceClassification

import visadapt
from tests.models import short
from tests.versions import LOADS_PROGRAMS
from visadapt.backbone.compact import Compact, mapped, quantised
from visadapt.backbone.fingerprint import fingerprint
from visadapt.backbone.modules import own_modules
from visadapt.export.program import export
from visadapt.frozen.precision import NOTE
from visadapt.task_file import read
from visadapt.training import Recipe, fit

BF16, INT8, BOTH = {"compute": torch.bfloat16}, {"weights": "int8"}, {"compute": torch.bfloat16, "weights": "int8"}

TEXT = {"vocab_size": 60, "num_labels": 4}


def bert():
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = BertConfig(**small, **TEXT)
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    return BertForSequenceClassification(config)


def gpt2():
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, n_positions=16, pad_token_id=0, **TEXT)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    return GPT2ForSequenceClassification(config)


class Attention(nn.Module):
    """Torch's own encoder, which reads its projections' weights without calling their modules."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(16, 32)
        layer = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.fc = nn.Linear(32, 4)

    def forward(self, x):
        return self.fc(self.encoder(self.stem(x)).mean(1))


IMAGES, TOKENS = torch.randn(3, 3, 64, 64), torch.randint(1, 60, (3, 8))

BACKBONES = {
    "resnet18": (torchvision.models.resnet18, IMAGES),
    # two blocks, for what takes long by the block
    "narrow": (short, IMAGES),
    "regnet": (lambda: timm.create_model("regnetx_002"), IMAGES),
    "convnext": (lambda: timm.create_model("convnext_atto"), IMAGES),
    "vit": (lambda: timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2), IMAGES),
    "bert": (bert, TOKENS),
    "gpt2": (gpt2, TOKENS),
    "attention": (Attention, torch.randn(3, 5, 16)),
}


def injected(name="resnet18", norms="frozen", seed=0, where=None):
    """A copy of a model that is built once for all tests."""
    model = copy.deepcopy(built(name, norms, seed, where))
    torch.manual_seed(seed)
    return model


@cache
def plain_resnet():
    torch.manual_seed(0)
    return torchvision.models.resnet18().eval()


@cache
def built(name, norms, seed, where):
    torch.manual_seed(seed)
    model = BACKBONES[name][0]()
    visadapt.inject(model, m=4, task="t", num_classes=5, norms=norms, where=where)
    with torch.no_grad():
        for parameter in visadapt.parameters(model, "t"):
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model.eval()


def logits_of(model, x):
    out = model(x)
    return out if isinstance(out, torch.Tensor) else out.logits


def step(model, x):
    logits = logits_of(model, x)
    gradients = torch.autograd.grad(logits.square().mean(), visadapt.parameters(model, "t"), allow_unused=True)
    return logits.detach(), torch.cat([g.flatten().double() for g in gradients if g is not None])


def off(found, expected):
    """The error relative to the norm."""
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


def held(model):
    """Bytes of the distinct storages of the backbone's parameters."""
    sizes = {}
    for module in own_modules(model).values():
        for parameter in module._parameters.values():
            if isinstance(parameter, Compact):
                tensors = [t for t in (parameter.stored.values, parameter.stored.scale) if t is not None]
            else:
                tensors = [] if parameter is None else [parameter]
            sizes |= {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(sizes.values())


@pytest.mark.parametrize("norms", ["frozen", "affine"])
@pytest.mark.parametrize("name", BACKBONES)
def test_bfloat16_is_as_near_as_autocast(name, norms):
    model, x = injected(name, norms), BACKBONES[name][1]
    logits, gradient = step(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        cast = step(model, x)
    found = step(visadapt.lean(model, **BF16), x)
    assert found[0].dtype == torch.float32
    assert off(found[0], logits) <= 1.5 * off(cast[0], logits) + 1e-3
    assert off(found[1], gradient) <= 1.5 * off(cast[1], gradient) + 1e-2
    assert all(p.dtype == torch.float32 for p in visadapt.parameters(model, "t"))


@pytest.mark.parametrize("options", [INT8, BOTH], ids=["int8", "int8 in bfloat16"])
@pytest.mark.parametrize("name", BACKBONES)
def test_codes_are_near(name, options):
    model, x = injected(name), BACKBONES[name][1]
    logits, gradient = step(model, x)
    found = step(visadapt.lean(model, **options), x)
    assert off(found[0], logits) < 0.05
    assert F.cosine_similarity(found[1], gradient, 0) > 0.95


@pytest.mark.parametrize("options", [BF16, INT8, BOTH], ids=["bfloat16", "int8", "both"])
@pytest.mark.parametrize("name", BACKBONES)
def test_undone_bit_for_bit(name, options):
    model, x = injected(name), BACKBONES[name][1]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    logits, classes = logits_of(model, x), {path: type(m) for path, m in model.named_modules()}
    visadapt.lean(model, **options)
    while_lean = model.state_dict()
    assert list(while_lean) == list(state)
    assert all(torch.equal(while_lean[key], value) for key, value in state.items())
    visadapt.unlean(model)
    assert torch.equal(logits_of(model, x), logits)
    assert {path: type(m) for path, m in model.named_modules()} == classes
    assert not any(isinstance(p, Compact) for p in model.parameters())


@pytest.mark.parametrize("name", ["resnet18", "bert", "attention"])
def test_bytes_in_memory(name):
    model = BACKBONES[name][0]()
    matrices = sum(4 * p.numel() for p in model.parameters() if p.ndim > 1)
    tables = sum(4 * m.weight.numel() for m in model.modules() if isinstance(m, nn.Embedding))
    rest = sum(4 * p.numel() for p in model.parameters()) - matrices
    visadapt.inject(model, m=2, task="t", num_classes=3, norms="frozen")
    visadapt.lean(model, **BF16)
    assert held(model) == rest + tables + (matrices - tables) // 2
    visadapt.lean(visadapt.unlean(model), **INT8)
    scales = sum(4 * p.stored.scale.numel() for p in model.parameters() if isinstance(p, Compact))
    assert held(model) == rest + matrices // 4 + scales


def test_folded_codes_are_not_kept_twice():
    model = visadapt.lean(injected(), **BOTH)
    model(IMAGES)
    folds = model.__dict__["_visadapt"].lean.folds
    codes = {pair.conv.weight.stored.values.data_ptr() for pair in folds.pairs}
    assert {kernel.stored.values.data_ptr() for kernel, _ in folds.weights().values()} == codes


@pytest.mark.parametrize("name", ["resnet18", "vit"])
@pytest.mark.parametrize("options", [BF16, BOTH], ids=["bfloat16", "int8"])
def test_training_moves_the_task_alone(name, options):
    model, x = injected(name, "affine"), BACKBONES[name][1]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    visadapt.lean(model, **options).train()
    optimiser = torch.optim.AdamW(visadapt.parameters(model, "t"), lr=1e-3)
    losses = []
    for _ in range(4):
        optimiser.zero_grad()
        loss = F.cross_entropy(logits_of(model, x), torch.arange(len(x)))
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    after = model.state_dict()
    moved = {key for key, value in before.items() if not torch.equal(after[key], value)}
    assert moved
    assert all(".visadapt." in key for key in moved)


def test_autocast_inference_mode_and_layers_called_alone():
    model = visadapt.lean(injected(), **BF16)
    with torch.inference_mode():
        first = model(IMAGES)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model(IMAGES).dtype == torch.bfloat16
    assert model.layer1(torch.randn(2, 64, 8, 8)).dtype == torch.float32
    logits, gradient = step(model, IMAGES)
    assert torch.equal(logits, first)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("options", [BF16, BOTH], ids=["bfloat16", "int8"])
def test_checkpointing_gives_the_same_gradients(options, reentrant):
    model = visadapt.lean(injected(), **options)
    expected = step(model, IMAGES)[1]
    inner = model.layer2.forward
    model.layer2.forward = lambda x: checkpoint(inner, x, use_reentrant=reentrant)
    model(IMAGES).square().mean().backward()
    # what is computed again is not folded, so it rounds otherwise
    found = torch.cat([p.grad.flatten().double() for p in visadapt.parameters(model, "t") if p.grad is not None])
    assert off(found, expected) < 5e-3


@pytest.mark.parametrize("options", [BF16, INT8], ids=["bfloat16", "int8"])
def test_mixed_batches(options):
    model = injected(norms="affine")
    visadapt.inject(model, visadapt.LoRA(r=2), task="u", num_classes=3)
    visadapt.inject(model, visadapt.DAN(), task="v", num_classes=5, norms="frozen")
    visadapt.lean(model, **options)
    with torch.no_grad():
        alone = {}
        for task in ("t", "u", "v", None):
            with visadapt.using(model, task):
                alone[task] = model(IMAGES[:1].repeat(3, 1, 1, 1))[0]
        with visadapt.using(model, ["v", "t", "u"]):
            mixed = model(IMAGES[:1].repeat(3, 1, 1, 1))
    for task, row in zip(["v", "t", "u"], mixed, strict=True):
        expected = alone[task]
        torch.testing.assert_close(row[: len(expected)], expected, rtol=0.05, atol=0.03 * float(expected.abs().max()))


METHODS = {
    "full": visadapt.Full(),
    "dan": visadapt.DAN(),
    "lora": visadapt.LoRA(r=2),
    "dora": visadapt.DoRA(r=2),
    "parallel": visadapt.Parallel(),
}


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_methods_that_read_weights(name, late):
    """Put in before or after, what reads or copies a weight gets one that it can compute with, and train."""
    model = copy.deepcopy(plain_resnet())
    visadapt.inject(model, m=2, task="other", norms="frozen")
    if late:
        visadapt.lean(model, **BF16)
    visadapt.inject(model, METHODS[name], task="t", num_classes=3)
    visadapt.lean(model, **BF16)
    visadapt.activate(model, "t")
    assert not any(isinstance(p, Compact) for p in visadapt.parameters(model, "t"))
    model(IMAGES).sum().backward()
    assert all(p.grad is not None for p in visadapt.parameters(model, "t"))


@pytest.mark.parametrize("options", [BF16, INT8], ids=["bfloat16", "int8"])
def test_task_files_fit_the_backbone_as_before(options, tmp_path):
    model = injected()
    own = fingerprint(model)
    visadapt.lean(model, **options)
    assert fingerprint(model) == own
    path = visadapt.save(model, "t", tmp_path / "t")
    plain = copy.deepcopy(plain_resnet())
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if ".visadapt." not in k}, strict=False)
    visadapt.load(plain, path)
    expected = visadapt.unlean(model)(IMAGES)
    assert torch.equal(plain(IMAGES), expected)
    visadapt.lean(plain, **options)
    visadapt.load(plain, path, task="again")
    visadapt.activate(plain, "again")
    assert off(plain(IMAGES), expected) < 0.05


def test_a_task_trained_on_codes_says_so(tmp_path):
    model = injected()
    visadapt.inject(model, m=2, task="served")
    visadapt.lean(model, **INT8)
    visadapt.inject(model, m=2, task="new")
    visadapt.load(model, visadapt.save(model, "served", tmp_path / "served"), task="loaded")
    with torch.no_grad():
        for task in ("t", "new"):
            visadapt.parameters(model, task)[0].add_(1)
    for task, noted in {"t": True, "new": True, "served": False, "loaded": False}.items():
        notes = read(visadapt.save(model, task, tmp_path / task)).description["notes"]
        assert notes.get(NOTE) == ("int8" if noted else None)
    assert "weights kept as int8" in str(visadapt.summary(model))
    visadapt.unlean(model)
    assert visadapt.tasks(model)["t"].notes[NOTE] == "int8"


@pytest.mark.parametrize("options", [BF16, BOTH], ids=["bfloat16", "int8"])
def test_copies_pickles_and_checkpoints(options):
    model = visadapt.lean(injected(), **options)
    logits = model(IMAGES)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(IMAGES), logits)
        own, theirs = model.conv1.weight.stored, other.conv1.weight.stored
        assert own.values.data_ptr() != theirs.values.data_ptr()
        assert torch.equal(visadapt.unlean(other)(IMAGES), visadapt.unlean(copy.deepcopy(model))(IMAGES))
    other = injected(seed=1)
    expected = other(IMAGES)
    model.load_state_dict(other.state_dict())
    assert off(model(IMAGES), expected) < 0.05
    assert fingerprint(model) == fingerprint(other)
    assert torch.equal(visadapt.unlean(model)(IMAGES), expected)


def test_channels_last_and_back():
    model = visadapt.lean(injected(), **BF16)
    logits = model(IMAGES)
    model.to(memory_format=torch.channels_last)
    assert model.layer1[0].conv1.weight.stored.values.is_contiguous(memory_format=torch.channels_last)
    assert off(model(IMAGES.to(memory_format=torch.channels_last)), logits) < 0.01
    visadapt.unlean(model)
    assert model.layer1[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)


def test_eject_and_what_is_refused():
    model, plain = injected(), plain_resnet()
    visadapt.lean(model, **BF16)
    with pytest.raises(visadapt.VisadaptError, match=r"computing in bfloat16, and a merge .* call visadapt\.unlean"):
        visadapt.merge(model, "t")
    with pytest.raises(visadapt.VisadaptError, match="lean already, computing in bfloat16"):
        visadapt.lean(model, **INT8)
    visadapt.lean(model, keep=torch.bfloat16)
    for wrong in ({"compute": torch.float64}, {"weights": "int4"}, {"compute": torch.bfloat16, "original": "here"}):
        with pytest.raises(visadapt.VisadaptError):
            visadapt.lean(injected(), **wrong)
    visadapt.eject(model)
    assert not any(isinstance(p, Compact) for p in model.parameters())
    assert all(type(m) is type(n) for m, n in zip(model.modules(), plain.modules(), strict=True))


def test_without_originals_nothing_is_undone_in_part():
    model = visadapt.lean(injected(), **INT8, original=None)
    logits = model(IMAGES)
    for undo in (visadapt.unlean, visadapt.eject):
        with pytest.raises(visadapt.VisadaptError, match="was not kept"):
            undo(model)
        assert torch.equal(model(IMAGES), logits)
    assert list(visadapt.tasks(model)) == ["t"]


def test_tied_weights_stay_tied():
    model = gpt2()
    model.score.weight = nn.Parameter(model.transformer.wte.weight[:4].detach().clone())
    model.transformer.wpe.weight = model.transformer.wte.weight
    visadapt.inject(model, m=2, task="t", num_classes=3)
    visadapt.lean(model, **INT8)
    assert model.transformer.wpe.weight is model.transformer.wte.weight
    assert isinstance(model.transformer.wte.weight, Compact)
    visadapt.unlean(model)
    assert model.transformer.wpe.weight is model.transformer.wte.weight


def test_threads_read_while_another_trains():
    model = visadapt.lean(injected(), **BF16)
    visadapt.inject(model, m=2, task="u", num_classes=5, norms="frozen")
    with torch.no_grad(), visadapt.using(model, "u"):
        expected = model(IMAGES)
    wrong = []

    def serve():
        with torch.inference_mode(), visadapt.using(model, "u"):
            wrong.extend(not torch.equal(model(IMAGES), expected) for _ in range(5))

    threads = [threading.Thread(target=serve) for _ in range(2)]
    for thread in threads:
        thread.start()
    with visadapt.using(model, "t"):
        for _ in range(3):
            step(model, IMAGES)
    for thread in threads:
        thread.join()
    assert len(wrong) == 10
    assert not any(wrong)


def test_hooks_see_what_is_computed():
    model = visadapt.lean(injected(), **BF16)
    logits, seen = model(IMAGES), []
    handle = model.layer1[0].conv1.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    assert off(model(IMAGES), logits) < 0.02
    assert seen == [torch.bfloat16]
    handle.remove()


def test_prefix_cache(tmp_path):
    model = injected(where="layer4")
    images = torch.randn(4, 3, 64, 64)
    visadapt.lean(model, **BF16)
    cached = visadapt.cache_prefix(model, "t", images, file=tmp_path / "c")
    rows = torch.arange(4)
    with torch.no_grad():
        assert torch.equal(cached(rows).resume(), model(images))
    visadapt.unlean(model)
    with pytest.raises(visadapt.VisadaptError, match="changed since the cache was made"):
        cached(rows).resume()
    key = (tmp_path / "c.key").read_text()
    visadapt.cache_prefix(model, "t", images, file=tmp_path / "c")
    assert (tmp_path / "c.key").read_text() != key


def test_quantisation_and_the_mapped_file():
    weight = torch.randn(6, 5, 3, 3) * torch.logspace(-3, 3, 6).view(6, 1, 1, 1)
    weight[2] = 0
    codes, scale = quantised(weight)
    assert codes.dtype == torch.int8
    assert scale.shape == (6, 1, 1, 1)
    assert (codes * scale - weight).abs().sub(scale / 2 * 1.01).max() <= 0
    again, same = quantised(codes * scale)
    assert torch.equal(again, codes)
    torch.testing.assert_close(same, scale, rtol=1e-6, atol=0)
    first, second = mapped([weight, weight[1:2].half()])
    assert torch.equal(first, weight)
    assert torch.equal(second, weight[1:2].half())


@pytest.mark.parametrize("options", [BF16, INT8, BOTH], ids=["bfloat16", "int8", "both"])
def test_fast_training_is_as_without_codes_up_to_rounding(options):
    """Autocast of ``fast`` on top of compact weights: the same task is learnt, in fp32 parameters."""
    labels = torch.tensor([0, 1, 2])
    recipe = Recipe(epochs=2, batch_size=3, lr=1e-3, fast=True, head_first=False)
    found = []
    for own in ({}, options):
        model = injected()
        if own:
            visadapt.lean(model, **own)
        before = {key: value.clone() for key, value in model.state_dict().items() if "visadapt" not in key}
        fit(model, "t", (IMAGES, labels), recipe=recipe, seed=0)
        after = model.state_dict()
        assert all(torch.equal(after[key], value) for key, value in before.items())
        assert all(p.dtype == torch.float32 for p in visadapt.parameters(model, "t"))
        found.append(torch.cat([p.detach().flatten() for p in visadapt.parameters(model, "t")]))
    assert off(found[1], found[0]) < 0.02


@LOADS_PROGRAMS
@pytest.mark.parametrize("options", [BF16, INT8, BOTH], ids=["bfloat16", "int8", "both"])
def test_exported_programs_answer_as_the_compact_model(options, tmp_path):
    model = visadapt.lean(injected("narrow"), **options)
    with torch.no_grad():
        expected = model(IMAGES)
    file = export(model, tmp_path / "t.pt2", task="t", example=IMAGES)
    found = torch.export.load(file).module()(IMAGES)
    assert off(found, expected) < 0.02
    with pytest.raises(visadapt.VisadaptError, match=r"call visadapt\.unlean"):
        visadapt.merge(model, "t")
