"""Detection: adapters in the frozen backbone of a Faster R-CNN, which trains its own region proposals and box heads.

python examples/detection.py    # about a minute on two cores, offline; writes shapes.visadapt
"""

import argparse
from collections import OrderedDict

import torch
from shapes import NAMES, shapes
from torchmetrics.detection import MeanAveragePrecision
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.ops import MultiScaleRoIAlign

import visadapt
from visadapt.data import resnet50

SIZE = 96


def detector():
    """A Faster R-CNN on the first half of the bundled ResNet-50, small enough for a CPU."""
    layers = OrderedDict(list(resnet50().named_children())[:6])  # up to layer2, with 512 channels
    backbone = torch.nn.Sequential(layers)
    backbone.out_channels = 512
    return FasterRCNN(
        backbone,
        min_size=SIZE,
        max_size=SIZE,
        rpn_anchor_generator=AnchorGenerator(sizes=((20, 28, 38),), aspect_ratios=((1.0,),)),
        box_roi_pool=MultiScaleRoIAlign(["0"], output_size=5, sampling_ratio=2),
        box_head=TwoMLPHead(512 * 25, 128),
        box_predictor=FastRCNNPredictor(128, len(NAMES)),
        rpn_post_nms_top_n_train=50,
        rpn_post_nms_top_n_test=30,
        box_batch_size_per_image=32,
        box_detections_per_img=10,
    )


@torch.no_grad()
def score(model, images, targets):
    """COCO's mean average precision (needs pycocotools)."""
    metric = MeanAveragePrecision()
    model.eval()
    for batch, labels in zip(images.split(20), [targets[i : i + 20] for i in range(0, len(targets), 20)], strict=True):
        metric.update(model(list(batch)), labels)
    return metric.compute()["map"].item()


options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
options.add_argument("--steps", type=int, default=100, help="training steps of 8 images")
options.add_argument("--test", type=int, default=60, help="test images")
args = options.parse_args()

torch.manual_seed(0)
parts = ("rpn.head", "roi_heads.box_head", "roi_heads.box_predictor")
model = visadapt.inject(detector(), m=16, task="shapes", train_also=parts)
print(visadapt.summary(model))
images, targets, _ = shapes(400, SIZE, seed=0)
test_images, test_targets, _ = shapes(args.test, SIZE, seed=1)

before = score(model, test_images, test_targets)
optimizer = torch.optim.AdamW(visadapt.parameters(model, "shapes"), lr=1e-3)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=args.steps)
for step in range(args.steps):
    rows = torch.randint(len(images), (8,)).tolist()
    model.train()
    losses = model([images[i] for i in rows], [targets[i] for i in rows])
    optimizer.zero_grad()
    sum(losses.values()).backward()
    optimizer.step()
    schedule.step()
    if step % 25 == 24:
        print(f"step {step + 1}: " + ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items()))
after = score(model, test_images, test_targets)
visadapt.save(model, "shapes", "shapes.visadapt")
print(f"mAP before {before:.3f}, after {after:.3f}")
