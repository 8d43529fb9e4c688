"""Compare a linear probe, norms, adapters and full fine-tuning of a ResNet-50 on CIFAR-10.

python examples/cifar_transfer.py            # under five minutes on two cores, offline
python examples/cifar_transfer.py --quick    # under a minute
python examples/cifar_transfer.py --sweep    # how the learning rates below were found
"""

from common import contenders, main, parser

from visadapt.experiments import Contender, ImageProblem
from visadapt.experiments.machine import computes_in_bf16
from visadapt.methods import Full, Parallel
from visadapt.training import Recipe

# Peak learning rates: the best on 1,500 validation images, which are in neither the training nor the test images.
# Result of: python examples/cifar_transfer.py --sweep --m 32 (table: docs/cifar10-sweep.md), in float32.
# Full fine-tuning is also better with the pretrained running statistics than with batch statistics: the sweep has both,
# the comparison only the better one.
EPOCHS = 1
RECIPES = {
    "Linear": Recipe(epochs=30, lr=1e-3),
    "Norms": Recipe(epochs=EPOCHS, lr=1e-2),
    "Bottleneck": Recipe(epochs=EPOCHS, lr=3e-3, norm_lr=3e-3),
    "Parallel": Recipe(epochs=EPOCHS, lr=1e-3, norm_lr=3e-3),
    "Full": Recipe(epochs=EPOCHS, lr=1e-4, head_lr=1e-3),
}
GRID = {
    "Linear": (1e-3, 3e-3, 1e-2),
    "Norms": (1e-3, 3e-3, 1e-2),
    "Bottleneck": (3e-4, 1e-3, 3e-3),
    "Parallel": (3e-4, 1e-3, 3e-3),
    "Full": (3e-5, 1e-4, 3e-4),
}

options = parser(__doc__.splitlines()[0], "bundled/resnet50", "cifar10", widths=(8, 32))
options.add_argument("--size", type=int, help="side of the resized images in pixels: 64, with --quick 32")
args = options.parse_args()
count = args.train or (96 if args.quick else 3000)
size = args.size or (32 if args.quick else 64)
epochs = args.epochs or (1 if args.quick else EPOCHS)

problem = ImageProblem(
    args.backbone,
    args.data,
    train=count,
    validation=100 if args.quick else 1500,
    test=100 if args.quick else None,
    size=size,
)
data = problem.splits
# from a random head: the learning rates above were swept that way
recipes = {
    name: recipe if name == "Linear" else recipe.replace(epochs=epochs, head_first=False)
    for name, recipe in RECIPES.items()
}
fast = computes_in_bf16(args.device)
recipes = {name: recipe.replace(fast=fast) for name, recipe in recipes.items()}
duration = f"{epochs} epoch{'s' * (epochs > 1)}"
caption = (
    f"{args.backbone} on {args.data}: {len(data.train):,} training images at {size} px, {duration} "
    f"(linear probe: {recipes['Linear'].epochs} on cached features), {len(data.test):,} test images, "
    f"trained in {'bf16 autocast' if fast else 'float32'}."
)
compared = contenders(args.m, recipes)
if args.sweep:
    compared.append(Contender("parallel r=C/8", Parallel(rank=0.125), recipes["Parallel"]))
    compared.append(Contender("full, batch statistics", Full(), recipes["Full"], norms="full"))
main(args, problem, compared, GRID, caption)
