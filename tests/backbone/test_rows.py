"""Whose row is it: the facts of small backbones of every build, and what they are refused for."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import transformers
from torch import nn

from visadapt import VisadaptError
from visadapt.backbone.examine import examine
from visadapt.backbone.rows import FREE, UNKNOWN, Lying, order_of

SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 40,
}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class Run(nn.Module):
    """A backbone with one linear whose rows a function lays out."""

    def __init__(self, before, after=lambda y: y) -> None:
        super().__init__()
        self.host = nn.Linear(8, 8)
        self.before, self.after = before, after

    def forward(self, x, *rest):
        return self.after(self.host(self.before(x, *rest)))


def facts(model, *args, n=4, **kwargs):
    return examine(model, (args, kwargs), n)


def windows(x):
    return x.reshape(-1, 2, 8)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (lambda x: x, lambda y: y, Lying(0)),
        (windows, lambda y: y.view(-1, 6, 8), Lying(0, 3, False)),
        (lambda x: torch.cat([x, x.flip(1)]), lambda y: sum(y.chunk(2)), Lying(0, 2, True)),
        (lambda x: x.transpose(0, 1).reshape(-1, 8), lambda y: y.view(6, -1, 8).transpose(0, 1), Lying(0, 6, True)),
        (lambda x: x.flip(0), lambda y: y.flip(0), UNKNOWN),
        (lambda x: x.transpose(0, 1), lambda y: y.transpose(0, 1), UNKNOWN),
        (lambda x: x - x.mean(0), lambda y: y, None),
    ],
    ids=["rows", "windows", "two views", "time-major", "reversed", "sequence first", "mixed"],
)
def test_how_rows_lie_at_a_host(before, after, expected):
    model, x = Run(before, after), torch.randn(4, 6, 8)
    if expected is None:
        with pytest.raises(VisadaptError, match="depends on the others"):
            facts(model, x)
        return
    found = facts(model, x)
    assert found.evidence
    assert found.outputs == {(): Lying(0)}
    assert found.hosts["host"].inputs == {(0, 0): expected}
    assert found.knows("host") == (expected != UNKNOWN)


@pytest.mark.parametrize(
    "before",
    [
        lambda x, size: x[size.argsort()],
        lambda x, size: x.index_select(0, size.sort()[1]),
        lambda x, size: x[sorted(range(len(x)), key=size.tolist().__getitem__)],
        lambda x, size: nn.utils.rnn.pack_padded_sequence(x, size.cpu(), True, enforce_sorted=False).data,
        lambda x, size: x[size > 2] if size.min() > 2 else x,
    ],
    ids=["index", "select", "python", "packed", "masked"],
)
def test_an_order_that_depends_on_the_data_is_not_trusted(before):
    sizes = torch.full((4,), 6)
    found = facts(Run(lambda x, size: before(x, size).sum() * 0 + x.mean(1)), torch.randn(4, 6, 8), sizes)
    assert found.reordered
    assert not found.knows("host")


DRAWS = {
    "permutation": torch.randperm,
    "sorted": lambda n: torch.rand(n).argsort(),
    "numbers": lambda n: torch.randint(n, (n,)),
    "python": lambda n: torch.randperm(n).tolist(),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_a_random_order_is_not_trusted(draw):
    found = facts(Run(lambda x: x[draw(len(x))].sum() * 0 + x.mean(1)), torch.randn(4, 6, 8))
    assert found.reordered
    assert not found.knows("host")


def test_tables_and_numbers_of_the_whole_batch_are_no_order():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.host = nn.Linear(2, 8), nn.Linear(8, 8)

        def forward(self, x, mask, table):
            if mask.all():
                x = x + 0
            return self.host(x[:, : int(mask.sum(1).max())]) + self.table(table).mean()

    # four rows by chance: the outputs of samples that are cut with the table would depend on each other
    found = facts(Net(), torch.randn(4, 6, 8), torch.ones(4, 6, dtype=torch.long), torch.randn(4, 2))
    assert found.cut == {(0, 0): 0, (0, 1): 0}
    assert not found.reordered
    assert found.knows("host")
    assert found.hosts["table"].inputs == {(0, 0): FREE}
    assert not found.knows("table")


def test_sequence_first_models_are_cut_along_their_batch():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32), 2, enable_nested_tensor=False)
    for length in (7, 4):
        for mode in (True, False):
            found = facts(model.train(mode), torch.randn(length, 4, 16))
            assert found.cut == {(0, 0): 1}
            assert found.outputs == {(): Lying(1)}
            assert not any(map(found.knows, found.hosts))


def test_lists_of_samples_and_lists_of_outputs():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.host = nn.Linear(3, 3)

        def forward(self, images, scale=None):
            return [{"boxes": self.host(image.mean(1)) * scale} for image in images]

    found = facts(Net(), [torch.randn(4, 5, 3) for _ in range(3)], scale=2.0, n=3)
    assert found.outputs == {(): Lying("items")}
    assert found.cut == {(0, 0): "items"}
    batch = {"image": torch.randn(3, 8), "more": (torch.randn(3, 8), None)}
    assert facts(Run(lambda b: b["image"] + b["more"][0]), batch, n=3).cut == {
        (0, 0, "image"): 0,
        (0, 0, "more", 0): 0,
    }


@pytest.mark.filterwarnings("ignore:.*past_key_values.*:FutureWarning")
def test_texts():
    ids, mask = torch.randint(5, 50, (4, 9)), torch.ones(4, 9, dtype=torch.long)
    bert = transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES, num_labels=2))
    for rows in (ids, ids[:1].expand(4, 9)):
        found = facts(bert.train(), input_ids=rows, attention_mask=mask, labels=torch.tensor([4, 3, 1, 0]))
        assert found.outputs == {("logits",): Lying(0), ("loss",): UNKNOWN}
        assert {path for path in found.hosts if path and not found.knows(path)} == {
            "bert.embeddings.position_embeddings"
        }
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
    cache = transformers.DynamicCache()
    for length in (9, 1):
        found = facts(llama, input_ids=ids[:, :length], past_key_values=cache)
        assert found.knows("model.layers.0.self_attn.q_proj")
        llama(input_ids=ids[:, :length], past_key_values=cache)
    assert cache.get_seq_length() == 10


def test_windows_of_a_swin():
    options = {"img_size": 64, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 2), "window_size": 4}
    found = facts(timm.create_model("swin_tiny_patch4_window7_224", **options), torch.randn(4, 3, 64, 64))
    assert all(map(found.knows, found.hosts))
    assert found.hosts["layers.0.blocks.1.attn"].order is False


def test_batches_that_are_not_of_so_many_samples_are_refused():
    model = timm.create_model("resnet18", channels=(8, 8, 8, 8)).eval()
    other = "{0} tasks .* a batch that ResNet does not treat as {0} samples .*treats it as 4 samples"
    for n, message in ((2, "2 tasks .* batch of 4"), (3, other.format(3)), (64, other.format(64))):
        with pytest.raises(VisadaptError, match=message):
            facts(model, torch.randn(4, 3, 64, 64), n=n)


def test_nothing_is_changed():
    model = timm.create_model("resnet18", channels=(8, 8, 8, 8)).train()
    seen = []
    model.layer1.register_forward_hook(lambda *args: seen.append(args))
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(4, 3, 32, 32)
    kept = x.clone()
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    facts(model, x)
    assert torch.equal(torch.rand(3), expected)
    assert not seen
    assert torch.equal(x, kept)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(module.training for module in model.modules())


def test_hooks_that_make_the_output_are_the_models_own_and_others_hear_nothing():
    sizes = {"hidden_sizes": [8, 8, 16, 16], "depths": [1] * 4, "decoder_hidden_size": 8}
    segformer = transformers.SegformerForSemanticSegmentation(transformers.SegformerConfig(**sizes))
    options = {"features_only": True, "out_indices": (1, 2)}
    hooked = timm.create_model("resnet18", channels=(8, 8, 8, 16), feature_cls="hook", **options)
    for model, keys in ((segformer, {("logits",)}), (hooked, {(0,), (1,)})):
        heard = []
        for module in model.modules():
            module.register_forward_hook(lambda module, args, out, heard=heard: heard.append(module))
        x = torch.randn(4, 3, 64, 64)
        model.eval()(x)  # some hooks are set up by the first forward
        heard.clear()
        assert facts(model, x).outputs == dict.fromkeys(keys, Lying(0))
        assert heard == []


def test_an_order_for_each_number_of_samples():
    for n in (1, 2, 3, 4, 5, 7, 8, 12, 16, 32, 63):
        order = list(order_of(n))
        assert len(order) == max(n, 3)
        # a mean of the batch must not be that of the two samples
        assert sum(order) / len(order) >= 0.6
        moved = [order[i:] + order[:i] for i in range(1, n)] + [order[::2] + order[1::2], order[::-1]]
        assert n < 4 or order not in moved
