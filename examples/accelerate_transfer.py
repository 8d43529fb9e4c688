"""Train a task with a loop of your own on accelerate, on one device or several: a frozen ResNet-50, CIFAR-10.

python examples/accelerate_transfer.py               # offline; writes cifar10.visadapt
accelerate launch examples/accelerate_transfer.py    # on all devices of this machine
"""

import accelerate
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import visadapt
from visadapt.data import load_images, normalize

accelerate.utils.set_seed(0)
accelerator = accelerate.Accelerator()
images = load_images("cifar10")
train = TensorDataset(normalize(images.train.images[:224], 32), images.train.labels[:224])
test = TensorDataset(normalize(images.test.images[:100], 32), images.test.labels[:100])

backbone = visadapt.inject("bundled/resnet50", m=8, task="cifar10", labels=images.classes, num_classes=10)
optimizer = torch.optim.AdamW(visadapt.parameters(backbone, "cifar10"), lr=3e-3)
model, optimizer, batches, held_out = accelerator.prepare(
    backbone, optimizer, DataLoader(train, batch_size=32, shuffle=True), DataLoader(test, batch_size=100)
)


@torch.no_grad()
def accuracy():
    """The fraction of test images whose largest logit is that of the label, over all processes."""
    model.eval()
    right = [accelerator.gather_for_metrics(model(inputs).argmax(-1) == labels) for inputs, labels in held_out]
    return torch.cat(right).float().mean().item()


before = accuracy()
for _ in range(2):
    model.train()
    for inputs, labels in batches:
        optimizer.zero_grad()
        accelerator.backward(F.cross_entropy(model(inputs), labels))
        optimizer.step()
after = accuracy()
if accelerator.is_main_process:
    visadapt.save(accelerator.unwrap_model(model), "cifar10", "cifar10.visadapt")
accelerator.print(f"accuracy before {before:.3f}, after {after:.3f}")
accelerator.end_training()
