"""One frozen MiniLM, one domain of sentiment: linear probe, norms, Houlsby's adapters, full fine-tuning, side by side.

python examples/text_transfer.py            # a few minutes on two cores, offline
python examples/text_transfer.py --quick    # under a minute
python examples/text_transfer.py --sweep    # other learning rates, on validation texts
"""

from common import contenders, main, parser

from visadapt.experiments import TextProblem
from visadapt.training import Recipe

# Peak learning rates: the best on validation texts, none of them trained on and none from the test split.
# Found by: python examples/text_transfer.py --sweep --m 64 (its table: docs/tweets-sweep.md)
EPOCHS = 3
RECIPES = {
    "Linear": Recipe(epochs=30, lr=3e-3),
    "Norms": Recipe(epochs=EPOCHS, lr=1e-2),
    "Bottleneck": Recipe(epochs=EPOCHS, lr=3e-3),
    "Full": Recipe(epochs=EPOCHS, lr=1e-4, head_lr=1e-3),
}
GRID = {
    "Linear": (3e-4, 1e-3, 3e-3),
    "Norms": (1e-3, 3e-3, 1e-2),
    "Bottleneck": (3e-4, 1e-3, 3e-3),
    "Full": (3e-5, 1e-4, 3e-4),
}

options = parser(__doc__.splitlines()[0], "bundled/minilm", "tweets", widths=(8, 64))
options.add_argument("--length", type=int, default=32, help="tokens; longer texts are cut")
args = options.parse_args()
count = args.train or (64 if args.quick else 1000)
epochs = args.epochs or (1 if args.quick else EPOCHS)

problem = TextProblem(
    args.backbone,
    args.data,
    train=count,
    validation=64 if args.quick else 500,
    test=100 if args.quick else None,
    length=args.length,
)
data = problem.splits
recipes = {way: recipe if way == "Linear" else recipe.replace(epochs=epochs) for way, recipe in RECIPES.items()}
lasting = f"{epochs} epoch{'s' * (epochs > 1)}"
caption = (
    f"{args.backbone} on {args.data} ({', '.join(data.classes)}): {len(data.train):,} training texts of at most "
    f"{args.length} tokens, {lasting} ({recipes['Linear'].epochs} of the linear probe, on features computed "
    f"once), {len(data.test):,} test texts."
)
main(args, problem, contenders(args.m, recipes), GRID, caption)
