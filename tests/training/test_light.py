"""Imports: the core without training, training without rich."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from visadapt import VisadaptError
from visadapt.training import METRICS, TensorBoard, fit, predict


def _run(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_core_does_not_import_training_nor_training_an_optional_library() -> None:
    _run(
        "import sys, visadapt; assert 'visadapt.training' not in sys.modules\n"
        "import visadapt.training, visadapt.experiments\n"
        "gone = {'rich', 'matplotlib', 'accelerate', 'torchmetrics', 'tensorboard'}\n"
        "gone |= {'transformers', 'timm', 'torchvision', 'PIL', 'sklearn'}\n"
        "assert not gone & set(sys.modules), gone & set(sys.modules)"
    )


def test_fit_works_without_rich() -> None:
    for block in ("sys.modules['rich'] = None", "pass"):
        _run(
            f"import sys, torch\n{block}\n"
            "from visadapt.training import Recipe, fit\n"
            "class Tty:\n"
            "    def isatty(self): return 'rich' in sys.modules\n"
            "    def write(self, text): pass\n"
            "    def flush(self): pass\n"
            "sys.stderr = Tty()\n"
            "fit(torch.nn.Linear(2, 2), None, (torch.zeros(4, 2), torch.tensor([0, 1, 0, 1])), recipe=Recipe(epochs=1))"
        )


def test_a_missing_library_is_an_error_that_names_its_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for library in ("accelerate", "torchmetrics", "torchmetrics.functional", "tensorboard"):
        monkeypatch.setitem(sys.modules, library, None)
    model, data = nn.Linear(2, 2), (torch.zeros(4, 2), torch.tensor([0, 1, 0, 1]))
    for call in (fit, predict):
        with pytest.raises(VisadaptError, match=r"training needs accelerate: pip install 'visadapt\[train\]'"):
            call(model, None, data)
    with pytest.raises(VisadaptError, match=r"the metric matthews needs torchmetrics: pip install 'visadapt\[train\]'"):
        METRICS["matthews"](*data)
    with pytest.raises(
        VisadaptError, match=r"TensorBoard's log needs tensorboard: pip install 'visadapt\[tensorboard\]"
    ):
        TensorBoard(tmp_path)
