"""Train a task with Lightning (pip install lightning torchmetrics): adapters in a frozen ResNet-50, CIFAR-10.

python examples/lightning_transfer.py    # offline; writes cifar10.visadapt
"""

import lightning
import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy

import visadapt
from visadapt.data import load_images, normalize


class TaskModule(lightning.LightningModule):
    """One task of an injected model; Lightning's own checkpoints would hold the whole backbone."""

    def __init__(self, model, task, classes, lr=3e-3):
        super().__init__()
        self.model, self.task, self.lr = model, task, lr
        self.accuracy = MulticlassAccuracy(classes, average="micro")

    def training_step(self, batch, _):
        images, labels = batch
        return F.cross_entropy(self.model(images), labels)

    def validation_step(self, batch, _):
        images, labels = batch
        self.accuracy(self.model(images), labels)
        self.log("accuracy", self.accuracy)

    def configure_optimizers(self):
        return torch.optim.AdamW(visadapt.parameters(self.model, self.task), lr=self.lr)


def loader(split, count, **options):
    """Batches of the first images of a split, at 32 px."""
    data = TensorDataset(normalize(split.images[:count], 32), split.labels[:count])
    return DataLoader(data, batch_size=32, **options)


lightning.seed_everything(0)
images = load_images("cifar10")
model = visadapt.inject("bundled/resnet50", m=8, task="cifar10", labels=images.classes, num_classes=10)
module = TaskModule(model.train(), "cifar10", 10)  # Lightning keeps the modes it finds
trainer = lightning.Trainer(max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False)
before = trainer.validate(module, loader(images.test, 100), verbose=False)[0]["accuracy"]
trainer.fit(module, loader(images.train, 224, shuffle=True))
after = trainer.validate(module, loader(images.test, 100), verbose=False)[0]["accuracy"]
visadapt.save(model, "cifar10", "cifar10.visadapt")
print(f"accuracy before {before:.3f}, after {after:.3f}")
