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


def _run(code: str, *options: str) -> None:
    done = subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_core_does_not_import_training_nor_any_of_these_rooms_an_optional_library() -> None:
    """The core and an injection first, then the rooms for data, training and experiments."""
    _run(
        "import sys, visadapt, torch\n"
        "gone = {'rich', 'matplotlib', 'accelerate', 'torchmetrics', 'tensorboard', 'datasets'}\n"
        "gone |= {'transformers', 'timm', 'torchvision', 'PIL', 'sklearn'}\n"
        "assert 'visadapt.training' not in sys.modules\n"
        "assert not gone & set(sys.modules), gone & set(sys.modules)\n"
        "from torch import nn\n"
        "model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))\n"
        "example = torch.zeros(1, 3, 8, 8)\n"
        "model(example)\n"
        "visadapt.inject(model, visadapt.Bottleneck(m=1), where='0', example=example)\n"
        "str(visadapt.summary(model)), str(visadapt.sites(model, '0', example=example))\n"
        "assert not gone & set(sys.modules), gone & set(sys.modules)\n"
        "import visadapt.data\n"
        "assert not gone & set(sys.modules), gone & set(sys.modules)\n"
        "import visadapt.training, visadapt.experiments\n"
        "assert not gone & set(sys.modules), gone & set(sys.modules)",
        "-W",
        "error",
    )


def test_fit_works_without_rich() -> None:
    """On a stream that is not a terminal, then on a terminal where rich is not installed."""
    _run(
        "import sys, torch\n"
        "from visadapt.training import Recipe, fit\n"
        "class Tty:\n"
        "    def isatty(self): return 'rich' in sys.modules\n"
        "    def write(self, text): pass\n"
        "    def flush(self): pass\n"
        "sys.stderr = Tty()\n"
        "def run():\n"
        "    data = torch.zeros(4, 2), torch.tensor([0, 1, 0, 1])\n"
        "    fit(torch.nn.Linear(2, 2), None, data, recipe=Recipe(epochs=1))\n"
        "run()\n"
        "assert 'rich' not in sys.modules\n"
        "sys.modules['rich'] = None\n"
        "run()"
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
