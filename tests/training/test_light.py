"""What is imported when: the core without the training, the training without rich."""

from __future__ import annotations

import subprocess
import sys


def _run(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_core_brings_no_training_and_the_training_no_optional_library() -> None:
    _run(
        "import sys, visadapt; assert 'visadapt.training' not in sys.modules\n"
        "import visadapt.training, visadapt.experiments.command\n"
        "gone = {'rich', 'matplotlib', 'accelerate', 'transformers', 'timm', 'torchvision', 'PIL', 'sklearn'}\n"
        "assert not gone & set(sys.modules), gone & set(sys.modules)"
    )


def test_fit_works_without_rich_and_with_it_on_no_terminal() -> None:
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
