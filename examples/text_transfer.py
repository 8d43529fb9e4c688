"""Compare a linear probe, norms, Houlsby's adapters and full fine-tuning of MiniLM on the sentiment of tweets.

python examples/text_transfer.py            # a few minutes on two cores, offline
python examples/text_transfer.py --quick    # under a minute
python examples/text_transfer.py --sweep    # how the learning rates below were found
"""

from common import contenders, main, parser

from visadapt.experiments import TextProblem
from visadapt.training import Recipe

# Peak learning rates: the best on validation texts, which are in neither the training nor the test texts.
# Result of: python examples/text_transfer.py --sweep --m 64 (table: docs/tweets-sweep.md)
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
options.add_argument("--length", type=int, default=32, help="number of tokens; longer texts are truncated")
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
# from a random head: the learning rates above were swept that way
recipes = {
    name: recipe if name == "Linear" else recipe.replace(epochs=epochs, head_first=False)
    for name, recipe in RECIPES.items()
}
duration = f"{epochs} epoch{'s' * (epochs > 1)}"
caption = (
    f"{args.backbone} on {args.data} ({', '.join(data.classes)}): {len(data.train):,} training texts of at most "
    f"{args.length} tokens, {duration} (linear probe: {recipes['Linear'].epochs} on cached features), "
    f"{len(data.test):,} test texts."
)
main(args, problem, contenders(args.m, recipes), GRID, caption)
