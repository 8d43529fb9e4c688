"""Exported networks: the task's own answers for any batch, or a refusal that leaves nothing."""

from pathlib import Path

import pytest
import torch
from torch import nn

import visadapt
from tests.models import answer
from tests.versions import LOADS_PROGRAMS
from visadapt import VisadaptError
from visadapt.export.program import export


@LOADS_PROGRAMS
def test_a_program_answers_as_the_task_for_batches_of_any_size(tiny, image, tmp_path: Path) -> None:
    visadapt.inject(tiny, m=2, task="a", num_classes=3, norms="full")
    visadapt.inject(tiny, m=2, task="b", num_classes=5)
    tiny.train()
    path = export(tiny, tmp_path / "a.pt2", task="a", example=image)
    assert tiny.training, "the mode is what it was"
    assert visadapt.active(tiny) == "b"
    program = torch.export.load(path).module()
    batch = torch.cat([image, image.flip(-1), image.neg()])
    expected = answer(tiny.eval(), {"x": batch}, "a")
    torch.testing.assert_close(program(batch), expected)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pt2"]


class Moody(nn.Module):
    """Decides by its input's values, which no exporter can know."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layer(x)
        return out if bool(out.sum() > 0) else -out


def test_what_cannot_be_exported_leaves_what_was_there(tiny, tmp_path: Path) -> None:
    target = tmp_path / "old.pt2"
    target.write_text("old")
    with pytest.raises(VisadaptError, match="torch cannot export this Moody"):
        export(Moody(), target, example=torch.randn(2, 4))
    with pytest.raises(VisadaptError, match=r"would be exported as \.onnx or \.pt2"):
        export(tiny, tmp_path / "a.pt")
    visadapt.inject(tiny, m=2, task="flowers")
    with pytest.raises(VisadaptError, match="did you mean 'flowers'"):
        export(tiny, target, task="flower")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("old.pt2", "old")]
