"""What transformers' own tests ask of a model, asked of injected BERT, ViT and ResNet."""

import copy

import pytest
import torch
import transformers
from torch import nn

import visadapt

TEXT = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
IMAGE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
IMAGE |= {"image_size": 32, "patch_size": 16}
CNN = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [2, 2], "layer_type": "basic"}
MODELS = {
    "bert": (transformers.BertForSequenceClassification, transformers.BertConfig, TEXT),
    "vit": (transformers.ViTForImageClassification, transformers.ViTConfig, IMAGE),
    "resnet": (transformers.ResNetForImageClassification, transformers.ResNetConfig, CNN),
}
ATTENTION = ["bert", "vit"]
every = pytest.mark.parametrize("name", MODELS)


def plain(name: str) -> nn.Module:
    torch.manual_seed(0)
    cls, config, options = MODELS[name]
    return cls(config(num_labels=3, **options)).eval()


def injected(name: str, backbone: nn.Module | None = None) -> nn.Module:
    model = plain(name) if backbone is None else backbone
    torch.manual_seed(1)
    return visadapt.inject(model, visadapt.Bottleneck(m=4, init_std=0.1), task="t", num_classes=5)


def inputs(name: str) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    if name == "bert":
        return {"input_ids": torch.randint(5, 60, (2, 9), generator=generator)}
    return {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator)}


@every
def test_save_pretrained_and_from_pretrained_by_the_models_class(name, tmp_path):
    model, x = injected(name), inputs(name)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert type(again) is MODELS[name][0]
    assert torch.equal(again(**x).logits, plain(name)(**x).logits)
    injected(name, again).load_state_dict(model.state_dict())
    assert torch.equal(again(**x).logits, model(**x).logits)


@every
def test_another_model_is_built_by_the_class_of_an_injected_one(name):
    model = injected(name)
    other = type(model)(copy.deepcopy(plain(name).config))
    assert type(other) is MODELS[name][0]
    classes = {type(module) for module in model.modules()}
    norm = next(
        cls for cls in classes if issubclass(cls, nn.LayerNorm | nn.BatchNorm2d) and hasattr(cls, "_visadapt_base")
    )
    assert type(norm(4)) in (nn.LayerNorm, nn.BatchNorm2d)
    assert model(**inputs(name)).logits.shape == (2, 5)


CONVOLUTIONAL = [visadapt.Series(), visadapt.ConvAdapter(), visadapt.Bottleneck(m=4, depthwise=True)]
METHODS = [(name, method) for name in MODELS for method in (visadapt.Bottleneck(m=4), visadapt.LoRA(r=2))]
METHODS += [("resnet", method) for method in CONVOLUTIONAL]


@pytest.mark.filterwarnings("ignore:the .* has .* parameters, more than")
@pytest.mark.parametrize(("name", "method"), METHODS, ids=str)
def test_initialisers_leave_tasks_alone(name, method):
    model = plain(name)
    visadapt.inject(model, method, num_classes=5)
    before = copy.deepcopy(model.state_dict())
    model.post_init()
    model.init_weights()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@every
def test_gradient_checkpointing(name):
    if not MODELS[name][0].supports_gradient_checkpointing:
        with pytest.raises(ValueError, match=r"does not support (gradient|activation) checkpointing"):
            injected(name).gradient_checkpointing_enable()
        return
    found = []
    for checkpointing in (False, True):
        model = injected(name).train()
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(**inputs(name)).logits.square().sum().backward()
        found.append([p.grad for p in visadapt.parameters(model, "t")])
    for own, other in zip(*found, strict=True):
        torch.testing.assert_close(own, other)


@every
def test_hidden_states_do_not_grow(name):
    model, x = injected(name), inputs(name)
    layers = {len(model(**x, output_hidden_states=True).hidden_states) for _ in range(3)}
    assert layers == {len(plain(name)(**x, output_hidden_states=True).hidden_states)}
    assert torch.equal(model(**x, return_dict=False)[0], model(**x).logits)


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_implementations(name):
    model, x = plain(name), inputs(name)
    model.set_attn_implementation("eager")
    injected(name, model)
    eager = model(**x, output_attentions=True)
    assert len(eager.attentions) == 2
    assert eager.attentions[0].shape[:2] == (2, 4)
    model.set_attn_implementation("sdpa")
    torch.testing.assert_close(model(**x).logits, eager.logits)


def test_embeddings_are_resized_and_replaced():
    model, x = injected("bert"), inputs("bert")
    expected = model(**x).logits
    model.resize_token_embeddings(70)
    assert model.config.vocab_size == 70
    assert torch.equal(model(**x).logits, expected)
    assert model(input_ids=torch.full((1, 4), 66)).logits.shape == (1, 5)
    own = nn.Embedding(70, 32)
    model.set_input_embeddings(own)
    assert model.get_input_embeddings() is own
    assert torch.equal(model(inputs_embeds=own(x["input_ids"])).logits, model(**x).logits)


@every
def test_modes_copies_and_losses(name):
    model, x = injected(name), inputs(name)
    expected = model(**x).logits
    model.train()
    assert model.training
    assert torch.equal(model.eval()(**x).logits, expected)
    assert torch.equal(copy.deepcopy(model)(**x).logits, expected)
    loss = model(**x, labels=torch.tensor([4, 1])).loss
    torch.testing.assert_close(loss, nn.functional.cross_entropy(expected, torch.tensor([4, 1])))
    assert model.num_parameters(only_trainable=True) == sum(p.numel() for p in visadapt.parameters(model, "t"))


@every
def test_outputs_are_the_same_each_time_as_tuples_and_in_other_batches(name):
    model, x = injected(name), inputs(name)
    with torch.no_grad():
        expected = model(**x).logits
        assert torch.equal(model(**x).logits, expected)
        tuples = model(**x, output_hidden_states=True, return_dict=False)
        named = model(**x, output_hidden_states=True)
        assert torch.equal(tuples[0], named.logits)
        assert all(torch.equal(one, other) for one, other in zip(tuples[1], named.hidden_states, strict=True))
        alone = torch.cat([model(**{key: value[i : i + 1] for key, value in x.items()}).logits for i in range(2)])
    torch.testing.assert_close(alone, expected)


@every
def test_hidden_states_and_inputs_keep_their_gradients(name):
    model = injected(name).train()
    out = model(**inputs(name), output_hidden_states=True)
    for hidden in out.hidden_states[1:]:
        hidden.retain_grad()
    out.logits.square().sum().backward()
    assert all(hidden.grad is not None for hidden in out.hidden_states[1:-1])
    assert all(p.grad is None for n, p in model.named_parameters() if ".visadapt." not in n)
    assert all(p.grad is not None for p in visadapt.parameters(model, "t"))


def test_feed_forward_in_chunks():
    model, x = injected("bert"), inputs("bert")
    with torch.no_grad():
        expected = model(**x).logits
        for layer in model.bert.encoder.layer:
            layer.chunk_size_feed_forward, layer.seq_len_dim = 3, 1
        torch.testing.assert_close(model(**x).logits, expected)


def test_embedded_inputs():
    model, x = injected("bert"), inputs("bert")
    with torch.no_grad():
        embedded = model.get_input_embeddings()(x["input_ids"])
        assert torch.equal(model(inputs_embeds=embedded).logits, model(**x).logits)


LABELS = {
    "regression": (1, torch.tensor([[0.5], [2.0]]), nn.MSELoss()),
    "single_label_classification": (4, torch.tensor([3, 0]), nn.CrossEntropyLoss()),
    "multi_label_classification": (4, torch.tensor([[0.0, 1, 1, 0], [1, 0, 0, 1]]), nn.BCEWithLogitsLoss()),
}


@pytest.mark.parametrize("problem", LABELS)
@pytest.mark.parametrize("name", ["bert", "resnet"])
def test_losses_by_the_kind_of_problem(name, problem):
    width, labels, loss = LABELS[problem]
    model = plain(name)
    model.config.problem_type = problem
    visadapt.inject(model, m=4, task="t", num_classes=width)
    model.config.problem_type = problem
    out = model(**inputs(name), labels=labels)
    torch.testing.assert_close(out.loss, loss(out.logits, labels))
    out.loss.backward()
    assert all(p.grad is not None for p in visadapt.parameters(model, "t"))


@every
def test_whole_model_is_saved_and_loaded_by_torch(name, tmp_path):
    model, x = injected(name), inputs(name)
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(again(**x).logits, model(**x).logits)
    assert visadapt.active(again) == "t"
