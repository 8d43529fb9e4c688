"""The command that drives architectures through every promise tells right from refused, wrong and crash."""

import torch
from torch import nn

import visadapt
from benchmarks import architectures as command
from benchmarks.driven import CHECKS, Driven, drive
from benchmarks.vision_models import MODELS, smaller
from tests.backbone.architectures import TIMM
from tests.runtime.builds import Audio, Build

AUDIO = Build("audio", Audio, lambda n: ((torch.randn(n, 2, 40),), {}))


def test_right_refused_and_wrong():
    driven = Driven(AUDIO, 4)
    row = drive(driven, visadapt.SSF(), last=False)
    assert {row[check] for check in CHECKS} == {"right", ""}, row
    assert row["eject"] == ""
    row = drive(driven, visadapt.AdaptFormer(m=2), last=False)
    assert (row["start"], row["eval"]) == ("refused", "")
    assert "AdaptFormer" in row["details"] or "mlp" in row["details"]
    with torch.no_grad():
        next(driven.model.parameters()).add_(1.0)
    assert "other tensors" in driven.frozen()


class Indexed(nn.Module):
    """Keeps a table for the size of its input, reads its norm's output transposed, and has a token that is not used."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.fc = nn.Conv2d(3, 4, 2, 2), nn.BatchNorm2d(4), nn.Linear(4, 3)
        self.token = nn.Parameter(torch.ones(4))
        self.register_buffer("table", torch.zeros(1), persistent=False)

    def forward(self, x):
        x = self.norm(self.stem(x)).flatten(2).transpose(1, 2)
        if len(self.table) != x.shape[1]:
            self.table = torch.linspace(0.5, 1.5, x.shape[1])
        return self.fc(torch.tanh(x).mul(self.table[:, None]).mean(1))


INDEXED = Build("indexed", Indexed, lambda n: ((torch.randn(n, 3, 8, 10),), {}))


def test_what_the_plain_backbone_does_itself_is_not_wrong():
    row = drive(Driven(INDEXED, 3), visadapt.Full())
    assert {row[check] for check in CHECKS} == {"right"}, row


def test_torch_alone_is_wrong_for_a_transposed_gradient_of_one_sample():
    # if this fails, torch is right, and agreement.py needs no second sample of each task
    norm, grad = nn.BatchNorm2d(3).eval(), torch.randn(1, 20, 3)
    norm(torch.randn(1, 3, 4, 5)).flatten(2).transpose(1, 2).backward(grad)
    assert not torch.allclose(norm.bias.grad, grad.sum((0, 1)), atol=1e-2)


def test_a_crash_is_counted():
    class Broken(visadapt.Bottleneck):
        def build(self, *args, **kwargs):
            raise IndexError("7")

    row = drive(Driven(AUDIO, 4), Broken(m=2))
    assert row["start"] == "crash"
    assert "IndexError: 7" in row["details"]
    assert row["eject"] == "right"


def test_results_resume_and_are_counted(tmp_path, capsys, monkeypatch):
    out = tmp_path / "results.csv"
    command.write(out, {})
    for name in ("Bottleneck", "LoRA"):
        command.append(out, MODELS[0], name, {"start": "right", "eval": "wrong", "seconds": "1.0"})
    monkeypatch.setattr(command, "work_alone", None)  # nothing may be driven again
    command.main(["--only", MODELS[0].name, "--methods", "Bottleneck,LoRA", "--out", str(out)])
    last = capsys.readouterr().out.splitlines()[-1].split()
    assert last == ["all", "1", "2", "0", "2", "0", "0"]


def test_models_are_named_once_and_made_small():
    assert len({model.name for model in MODELS}) == len(MODELS)
    one = smaller(next(each for each in TIMM if each.name == "resnet10t"))
    assert (one.size, one.options) == (64, {"layers": (1, 1, 1, 1)})
