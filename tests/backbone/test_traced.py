"""What the dataflow of home-made networks shows: ends of branches, layouts, and nothing left behind."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import visadapt
from visadapt import VisadaptError
from visadapt.backbone.modules import own_modules
from visadapt.backbone.trace import trace_flow


def plan(model: nn.Module, example: Tensor | None = None) -> list[tuple[str, str, int, str]]:
    return [
        (s.kind, s.host, s.channels, s.layout) for s in visadapt.sites(model, example=example) if s.kind != "conv3x3"
    ]


class Plain(nn.Module):
    """y = x + f(x), the branch ending in a norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 1)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm(self.second(F.relu(self.first(x)))))


class Projected(Plain):
    """The shortcut has a convolution of its own, and is the first summand."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.skip = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.skip(x) + self.norm(self.second(F.relu(self.first(x))))


class Scaled(Plain):
    """A LayerScale that is a parameter, and a dropout behind it."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.gamma = nn.Parameter(torch.full((width, 1, 1), 0.1))
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.gamma * self.second(F.relu(self.first(x))))


class Last(nn.Module):
    """Channels last inside: a map of (height, width, channels) and a linear."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.first = nn.Linear(width, 2 * width)
        self.second = nn.Linear(2 * width, width)

    def branch(self, x: Tensor) -> Tensor:
        return self.second(F.gelu(self.first(self.norm(x))))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.branch(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Sequence(Last):
    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        tokens = tokens + self.branch(tokens)
        return tokens.transpose(1, 2).reshape(x.shape)


class Positions(nn.Module):
    """Two tables of relative positions, one per axis, as HaloNet and BoTNet have them."""

    def __init__(self, width: int, side: int) -> None:
        super().__init__()
        self.rows, self.columns = (nn.Parameter(torch.randn(side, width)) for _ in range(2))

    def forward(self, query: Tensor) -> Tensor:
        table = self.rows[:, None] + self.columns
        return 0.1 * (query.unflatten(1, table.shape[:2]).flatten(1, 2) @ table.flatten(0, 1).t()).relu()


class Attending(Plain):
    """Scores of attention are a sum as well, of which one part is computed by a module with two matrices."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.heads, self.positions = nn.Conv2d(width, 3 * width, 1), Positions(width, 8)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.heads(x).flatten(2).transpose(1, 2).chunk(3, -1)
        scores = (query @ key.transpose(1, 2) + self.positions(query)).softmax(-1)
        return x + self.second((scores @ value).transpose(1, 2).reshape(x.shape))


class Joined(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.norm(self.second(F.relu(self.first(x))))], 1)[:, : x.shape[1]] * 1.0


class Straight(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.second(F.relu(self.first(x)))))


class Net(nn.Module):
    def __init__(self, block: type[nn.Module], width: int = 8, depth: int = 2) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 4, 4)
        self.blocks = nn.Sequential(*(block(width) for _ in range(depth)))
        self.fc = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(self.stem(x)).mean((2, 3)))


@pytest.mark.parametrize(
    ("block", "kind", "host", "layout"),
    [
        (Plain, "block", "blocks.0.norm", "NCHW"),
        (Projected, "block", "blocks.0.norm", "NCHW"),
        (Scaled, "block", "blocks.0.drop", "NCHW"),
        (Last, "block", "blocks.0.second", "NHWC"),
        (Sequence, "block", "blocks.0.second", "NLC"),
        (Straight, "block", "blocks.0", "NCHW"),
        (Attending, "block", "blocks.0.second", "NCHW"),
    ],
)
def test_the_end_of_a_branch_is_found(block, kind, host, layout) -> None:
    assert plan(Net(block))[0] == (kind, host, 8, layout)
    assert len(plan(Net(block, depth=3))) == 3


@pytest.mark.parametrize("side", [32, 64])
@pytest.mark.parametrize(("block", "layout"), [(Straight, "NCHW"), (Last, "NHWC"), (Sequence, "NLC")])
def test_channels_are_found_where_all_axes_are_equal(block, layout, side) -> None:
    width = side // 4
    model = Net(block, width)
    assert [(s.channels, s.layout) for s in visadapt.sites(model, "block", example=torch.zeros(1, 3, side, side))] == [
        (width, layout)
    ] * 2


def test_channels_are_what_does_not_grow() -> None:
    class Permuted(Straight):
        # no layer tells where the channels of this output are
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).permute(0, 2, 3, 1).clone()

    class Back(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for block in self.blocks:
                x = block(x).permute(0, 3, 1, 2)
            return self.fc(x.mean((2, 3)))

    for example in (torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 32, 48)):
        found = visadapt.sites(Back(Permuted), "block", example=example)
        assert [(s.channels, s.layout) for s in found] == [(8, "NHWC")] * 2


def test_a_concatenated_branch_is_one_where_nothing_is_added() -> None:
    assert plan(Net(Joined))[0] == ("block", "blocks.0.norm", 8, "NCHW")


def test_the_same_place_in_a_block_without_shortcut() -> None:
    class Optional(Plain):
        skips = True

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if self.skips else self.norm(self.second(F.relu(self.first(x))))

    model = Net(Optional, depth=3)
    model.blocks[0].skips = False
    assert [s.host for s in visadapt.sites(model, "block")] == [f"blocks.{i}.norm" for i in range(3)]


def test_one_drop_path_for_two_branches_is_no_site() -> None:
    class Two(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.one, self.two = Last(width), Last(width)
            self.drop = nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            x = x.permute(0, 2, 3, 1)
            x = x + self.drop(0.5 * self.one.branch(x))
            x = x + self.drop(0.5 * self.two.branch(x))
            return x.permute(0, 3, 1, 2)

    assert [s.host for s in visadapt.sites(Net(Two, depth=1), "block")] == [
        "blocks.0.one.second",
        "blocks.0.two.second",
    ]


def test_shared_blocks_are_one_site_and_work() -> None:
    class Shared(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for _ in range(3):
                x = self.blocks(x)
            return self.fc(x.mean((2, 3)))

    model, x = Shared(Plain, depth=1).eval(), torch.randn(2, 3, 32, 32)
    before = model(x)
    assert [host for _, host, *_ in plan(model)] == ["blocks.0.norm"]
    visadapt.inject(model, m=4)
    assert torch.equal(model(x), before)


def test_the_head_is_no_place_for_an_adapter() -> None:
    class Headed(Net):
        def __init__(self) -> None:
            super().__init__(Straight)
            del self.fc
            self.head = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 5))

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.blocks(self.stem(x)).mean((2, 3)))

    assert all(host.startswith("blocks.") for _, host, *_ in plan(Headed()))


class Pooled(nn.Module):
    """A module of the head's library around the layer that gives the logits, as timm's ClassifierHead."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(width, width, 1)
        self.fc = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.reduce(x)).mean((2, 3)))


def test_a_block_around_the_head_is_no_place_either() -> None:
    stages = [nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1)) for _ in range(3)]
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(*stages), Pooled(4))
    x = torch.randn(2, 3, 8, 8)
    assert [site.host for site in visadapt.sites(model, example=x)] == ["1.0.2", "1.1.2", "1.2.2"]
    visadapt.inject(model, m=2, num_classes=7, example=x)
    assert model(x).shape == (2, 7)


def test_a_run_leaves_nothing_behind() -> None:
    class Caching(Net):
        def forward(self, x: Tensor) -> Tensor:
            self.seen = x.shape
            self.table = {"mean": self.stem.weight.mean()}
            return super().forward(x)

    model = Caching(Plain).train()
    model.blocks[1].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    visadapt.sites(model)
    assert not hasattr(model, "seen")
    assert not hasattr(model, "table")
    assert modes == [module.training for module in model.modules()]
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    # what an earlier forward left does not stop it either
    used = Caching(Plain)
    used(torch.zeros(2, 3, 32, 32))
    assert used.table["mean"].grad_fn is not None
    assert visadapt.sites(used) == visadapt.sites(model)


def test_what_was_found_is_found_again_with_tasks_inside() -> None:
    model = Net(Plain)
    first = visadapt.sites(model)
    visadapt.inject(model, m=4, task="a")
    assert visadapt.sites(copy.deepcopy(model)) == first


def test_a_changed_model_is_looked_at_again() -> None:
    model = Net(Plain)
    assert visadapt.sites(model, "block")[0].host == "blocks.0.norm"
    model.blocks = nn.Sequential(Scaled(8), Scaled(8))
    assert visadapt.sites(model, "block")[0].host == "blocks.0.drop"


class Odd(Net):
    """Takes what nobody would guess."""

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        return super().forward(x) * scale


def test_an_input_that_cannot_be_guessed_is_asked_for() -> None:
    with pytest.raises(VisadaptError, match=r"Odd does not run on a guessed input \(.*scale.*\); pass example="):
        visadapt.inject(Odd(Plain), m=4)
    with pytest.raises(VisadaptError, match="Odd does not run on the given example"):
        visadapt.inject(Odd(Plain), m=4, example=torch.zeros(2, 3, 32, 32))


def test_the_planes_of_an_image_are_guessed() -> None:
    import timm

    # one has its space folded into channels before the first convolution, the other was made for grey images
    folded = timm.create_model("tresnet_m", num_classes=2)
    grey = timm.create_model("regnetx_002", num_classes=2, in_chans=1)
    assert len(visadapt.sites(folded, "block")) == 21
    assert len(visadapt.sites(grey, "block")) == 13


def test_a_task_file_needs_no_example(tmp_path) -> None:
    model = Odd(Plain).eval()
    fresh = copy.deepcopy(model)
    example = (torch.randn(2, 3, 32, 32), torch.ones(()))
    visadapt.inject(model, m=4, task="a", num_classes=3, example=example)
    for p in visadapt.parameters(model, "a"):
        nn.init.normal_(p, std=0.1)
    visadapt.load(fresh, visadapt.save(model, "a", tmp_path / "a.visadapt"))
    assert torch.equal(fresh(*example), model(*example))


def test_a_model_that_fake_tensors_cannot_follow_runs_on_real_ones() -> None:
    class Data(Net):
        def forward(self, x: Tensor) -> Tensor:
            kept = x.mean((1, 2, 3)).unique()
            return super().forward(x) + len(kept)

    assert [host for _, host, *_ in plan(Data(Plain))] == ["blocks.0.norm", "blocks.1.norm"]


def test_torch_s_encoder_calls_its_layers_while_a_task_is_active() -> None:
    class Text(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(20, 16)
            layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
            self.fc = nn.Linear(16, 3)

        def forward(self, ids: Tensor) -> Tensor:
            return self.fc(self.encoder(self.embedding(ids)).mean(1))

    model, ids = Text().eval(), torch.randint(0, 20, (2, 6))
    with torch.no_grad():
        before = model(ids)
    visadapt.inject(model, m=4, task="a")
    assert plan(model)[0][:2] == ("attention", "encoder.layers.0.self_attn")
    with torch.no_grad():
        torch.testing.assert_close(model(ids), before)
        for p in visadapt.parameters(model, "a"):
            nn.init.normal_(p)
        # in eval mode torch has a fused kernel for this, which calls no layer
        changed = model(ids)
        assert not torch.allclose(changed, before, atol=1e-2)
        torch.testing.assert_close(copy.deepcopy(model)(ids), changed)
        with visadapt.using(model, None):
            assert torch.equal(model(ids), before)
    visadapt.eject(model)
    assert not [name for module in model.modules() for name in module.__dict__ if "visadapt" in name]


def test_the_flow_knows_what_came_from_what() -> None:
    model = Net(Plain)
    flow, _ = trace_flow(model, torch.zeros(1, 3, 32, 32))
    sums = [join for join in flow.joins if join.adds]
    assert len(sums) == 2
    stem = flow.calls_of()["stem"][0].output
    norm = flow.calls_of()["blocks.0.norm"][0].output
    assert sums[0].parts == (stem, norm)
    assert norm.comes_from(stem)
    assert not stem.comes_from(norm)
    assert [call.path for call in sums[0].stack] == ["", "blocks", "blocks.0"]
    assert set(flow.calls_of()) == set(own_modules(model))


class Parallel(nn.Module):
    """Adds attention and MLP of one input in one sum, as GPT-NeoX and GPT-J (one way) and Cohere (another) do."""

    def __init__(self, last: bool, experts: type[nn.Module] | None = None) -> None:
        super().__init__()
        self.norm, self.last = nn.LayerNorm(8), last
        self.attn = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        self.mlp = experts() if experts else nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

    def forward(self, x):
        h = self.norm(x)
        return self.mlp(h) + self.attn(h) + x if self.last else x + self.attn(h) + self.mlp(h)


class Experts(nn.Module):
    """One stack of matrices for all experts, which write to their rows of the output."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(2, 8, 12)), nn.Parameter(torch.randn(2, 12, 8))

    def forward(self, x):
        out = torch.zeros_like(x)
        for number, half in enumerate(x.chunk(2, 1)):
            index = torch.arange(half.shape[1]) + number * half.shape[1]
            out.index_add_(1, index, torch.relu(half @ self.up[number]) @ self.down[number])
        return out


class Below(nn.Module):
    """The matrices of all experts one below the other, as DBRX has them."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(24, 8)), nn.Parameter(torch.randn(24, 8))

    def forward(self, x):
        up, down = self.up.view(2, 12, 8), self.down.view(2, 12, 8)
        return sum(torch.relu(x @ up[number].T) @ down[number] for number in range(2))


@pytest.mark.parametrize("experts", [None, Experts, Below])
@pytest.mark.parametrize("last", [False, True])
def test_all_branches_of_a_sum_of_three_are_found(last, experts) -> None:
    model = nn.Sequential(nn.Linear(4, 8), Parallel(last, experts), Parallel(last), nn.Linear(8, 3))
    found = visadapt.sites(model, example=torch.randn(2, 6, 4))
    hosts = [site.host for site in found if site.layout == "NLC"]
    for branch in ("1.attn", "1.mlp", "2.attn", "2.mlp"):
        assert sum(host.startswith(branch) for host in hosts) == 1
