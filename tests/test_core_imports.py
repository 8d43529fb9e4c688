"""The core runs on torch, safetensors and the standard library."""

import subprocess
import sys

BLOCKED = (
    "numpy",
    "timm",
    "torchvision",
    "PIL",
    "transformers",
    "accelerate",
    "rich",
    "typer",
    "matplotlib",
    "sklearn",
)

PROGRAM = """
import sys, warnings

class Without:
    # finds what another finder finds, but for the blocked modules

    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in BLOCKED else self.finder.find_spec(name, path, target)


sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # torch's own, where there is none
import torch
from torch import nn
import visadapt


class Block3(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)

    def forward(self, x):
        return torch.relu(x + self.bn1(self.conv1(x)))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.layers = nn.Sequential(Block3(8), Block3(8))
        self.fc = nn.Linear(8, 10)

    def forward(self, x):
        return self.fc(self.layers(self.stem(x)).mean((2, 3)))


def build():
    torch.manual_seed(0)
    return Net()


x = torch.randn(4, 3, 16, 16)
model = visadapt.inject(build(), m=4, task="a", num_classes=3)
visadapt.inject(model, visadapt.Parallel(), task="b", num_classes=5)
optimiser = torch.optim.SGD(visadapt.parameters(model, "a"), lr=0.1)
with visadapt.using(model, "a"):
    before = model(x)
    torch.nn.functional.cross_entropy(before, torch.tensor([0, 1, 2, 0])).backward()
optimiser.step()
model.eval()
with torch.no_grad():
    with visadapt.using(model, "a"):
        alone = model(x)
    assert not torch.equal(alone, before)
    for task in "ab":
        visadapt.save(model, task, f"{FOLDER}/{task}.visadapt")
    fresh = build().eval()
    for task in "ab":
        visadapt.load(fresh, f"{FOLDER}/{task}.visadapt")
    with visadapt.using(fresh, "a"):
        assert torch.equal(fresh(x), alone)
    with visadapt.using(fresh, ["a", "b", "a", "b"]):
        mixed = fresh(x)
    torch.testing.assert_close(mixed[::2, :3], alone[::2])
visadapt.merge(fresh, "b")
print(visadapt.summary(fresh), visadapt.sites(fresh), sep="\\n")
assert not {name.partition(".")[0] for name in sys.modules} & set(BLOCKED)
"""


def test_the_core_needs_torch_and_safetensors_only(tmp_path):
    program = f"BLOCKED, FOLDER = {BLOCKED!r}, {str(tmp_path)!r}\n{PROGRAM}"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert ran.returncode == 0, ran.stderr
    assert "backbone without head" in ran.stdout
