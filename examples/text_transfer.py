"""One frozen MiniLM, one domain of sentiment: linear probe, norms, Houlsby's adapters, full fine-tuning, side by side.

python examples/text_transfer.py            # a few minutes on two cores, offline
python examples/text_transfer.py --quick    # under a minute
python examples/text_transfer.py --sweep    # other learning rates, on validation texts
"""

import torch
from transformers import AutoTokenizer, logging

from visadapt.data import load_text, minilm_path
from visadapt.experiments import Problem
from visadapt.experiments.command import contenders, main, parser
from visadapt.hub import resolve
from visadapt.training import Recipe, tokenised

# Peak learning rates within the ranges of Houlsby et al. 2019, §3; --sweep tries those of GRID on the validation split.
EPOCHS = 3
RECIPES = {
    "Linear": Recipe(epochs=30, lr=1e-3),
    "Norms": Recipe(epochs=EPOCHS, lr=3e-3),
    "Bottleneck": Recipe(epochs=EPOCHS, lr=1e-3),
    "Full": Recipe(epochs=EPOCHS, lr=1e-4, head_lr=1e-3),
}
GRID = {
    "Linear": (3e-4, 1e-3, 3e-3),
    "Norms": (1e-3, 3e-3, 1e-2),
    "Bottleneck": (3e-4, 1e-3, 3e-3),
    "Full": (3e-5, 1e-4, 3e-4),
}

logging.set_verbosity_error()  # transformers warns that the head is new: it is meant to be
logging.disable_progress_bar()
options = parser(__doc__.splitlines()[0], "bundled/minilm", "tweets", widths=(8, 64))
options.add_argument("--tokenizer", help="folder or name; the backbone's own by default")
options.add_argument("--length", type=int, default=32, help="tokens; longer texts are cut")
args = options.parse_args()
count = args.train or (64 if args.quick else 1000)
epochs = args.epochs or (1 if args.quick else EPOCHS)

data = load_text(args.data)
known = args.tokenizer or (minilm_path() if args.backbone == "bundled/minilm" else args.backbone.removeprefix("hf/"))
tokenizer = AutoTokenizer.from_pretrained(str(known))


def tensors(split, most):
    """A random part of a split, shortest texts first, so that batches in order have little padding."""
    chosen = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))[:most].tolist()
    return tokenised(tokenizer, split.subset(sorted(chosen, key=lambda i: len(split.texts[i]))), args.length)


problem = Problem(
    name=args.data.replace("/", "-"),
    build=lambda: resolve(args.backbone),
    labels=data.classes,
    train=tensors(data.train, count),
    validation=tensors(data.validation, 64 if args.quick else 500),
    test=tensors(data.test, 100 if args.quick else None),
    settings={"backbone": args.backbone, "length": args.length, "train": count, "quick": args.quick},
)
recipes = {way: recipe if way == "Linear" else recipe.replace(epochs=epochs) for way, recipe in RECIPES.items()}
lasting = f"{epochs} epoch{'s' * (epochs > 1)}"
caption = (
    f"{args.backbone} on {args.data} ({', '.join(data.classes)}): {len(problem.train):,} training texts of at most "
    f"{args.length} tokens, {lasting} ({recipes['Linear'].epochs} of the linear probe, on features computed "
    f"once), {len(problem.test):,} test texts."
)
main(args, problem, contenders(args.m, recipes), GRID, caption)
