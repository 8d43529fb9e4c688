"""The command that drives architectures through every promise tells right from refused, wrong and crash."""

import torch

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
    row = drive(driven, visadapt.Bottleneck(m=2), last=False)
    assert (row["start"], row["frozen"], row["eject"]) == ("wrong", "wrong", "wrong")
    assert row["eval"] == "right"


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
