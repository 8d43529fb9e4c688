"""Segmentation: adapters in a frozen ResNet-50 under an LR-ASPP head, trained by ``fit`` on dense labels.

python examples/segmentation.py    # about a minute on two cores, offline; writes shapes.visadapt
"""

import argparse

import torch
from shapes import NAMES, shapes
from torchmetrics.classification import MulticlassJaccardIndex
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.segmentation import LRASPP

import visadapt
from visadapt.data import resnet50
from visadapt.training import Recipe, evaluate, fit

SIZE = 96

options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
options.add_argument("--epochs", type=int, default=3, help="passes over 240 images")
args = options.parse_args()

torch.manual_seed(0)
backbone = IntermediateLayerGetter(resnet50(), {"layer1": "low", "layer3": "high"})
network = LRASPP(backbone, low_channels=256, high_channels=1024, num_classes=len(NAMES))
# the task trains its own copy of the new head, and adapters in the backbone
model = visadapt.inject(network, m=16, task="shapes", train_also="classifier")
print(visadapt.summary(model))

images, _, masks = shapes(240, SIZE, seed=0)
test_images, _, test_masks = shapes(60, SIZE, seed=1)
train, test = (images, masks), (test_images, test_masks)
mean_iou = MulticlassJaccardIndex(num_classes=len(NAMES))

before = evaluate(model, "shapes", test, (mean_iou,))["MulticlassJaccardIndex"]
recipe = Recipe(epochs=args.epochs, lr=3e-3, batch_size=8)
history = fit(model, "shapes", train, test, recipe, metric=mean_iou)
print(history)
visadapt.save(model, "shapes", "shapes.visadapt")
print(f"mean IoU before {before:.3f}, after {history.score:.3f}")
