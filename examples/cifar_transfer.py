"""One frozen ResNet-50, CIFAR-10: linear probe, norms, adapters and full fine-tuning, side by side.

python examples/cifar_transfer.py            # about six minutes on two cores, offline
python examples/cifar_transfer.py --quick    # under a minute
python examples/cifar_transfer.py --sweep    # how the learning rates below were found
"""

from common import contenders, main, parser

from visadapt.experiments import Contender, ImageProblem
from visadapt.methods import Full, Parallel
from visadapt.training import Recipe

# Peak learning rates: the best on 1,500 validation images, none of them trained on and none from the test split.
# Found by: python examples/cifar_transfer.py --sweep --m 32 (its table: docs/cifar10-sweep.md)
# Full fine-tuning, too, does better with the pretrained running statistics than with batch statistics: the sweep shows
# both, the table its better one.
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
options.add_argument("--size", type=int, help="side in pixels that the images are resized to: 64, quick 32")
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
recipes = {way: recipe if way == "Linear" else recipe.replace(epochs=epochs) for way, recipe in RECIPES.items()}
lasting = f"{epochs} epoch{'s' * (epochs > 1)}"
caption = (
    f"{args.backbone} on {args.data}: {len(data.train):,} training images at {size} px, {lasting} "
    f"({recipes['Linear'].epochs} of the linear probe, on features computed once), {len(data.test):,} test images."
)
who = contenders(args.m, recipes)
if args.sweep:
    who.append(Contender("parallel r=C/8", Parallel(rank=0.125), recipes["Parallel"]))
    who.append(Contender("full, batch statistics", Full(), recipes["Full"], norms="full"))
main(args, problem, who, GRID, caption)
