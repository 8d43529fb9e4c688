"""The ``visadapt`` command: all subcommands, with errors reported as one line on standard error."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from visadapt import __version__
from visadapt.cli.evaluate import evaluate
from visadapt.cli.experiment import experiment
from visadapt.cli.export import export
from visadapt.cli.given import Command
from visadapt.cli.merge import merge
from visadapt.cli.output import say
from visadapt.cli.predict import predict
from visadapt.cli.push import push
from visadapt.cli.report import report
from visadapt.cli.serve import serve
from visadapt.cli.sites import sites
from visadapt.cli.summary import summary
from visadapt.cli.terminated import TERMINATED, Terminated
from visadapt.cli.train import train
from visadapt.errors import VisadaptError, command_line


class Commands(TyperGroup):
    """All subcommands. Exit codes: 0 success, 1 error, 2 wrong usage, 130 interrupted, 143 terminated."""

    def invoke(self, ctx: Any) -> Any:
        try:
            with command_line(), warnings.catch_warnings():
                warnings.showwarning = _print_warning
                answer = super().invoke(ctx)
                # what cannot be written is an error of the command, not of Python's exit
                sys.stdout.flush()
                return answer
        except BrokenPipeError as error:
            # whoever reads the output has enough
            _discard_output()
            raise typer.Exit(1) from error
        except (VisadaptError, OSError) as error:
            _discard_output()
            say(f"error: {' '.join(str(error).split())}")
            raise typer.Exit(1) from error
        except KeyboardInterrupt as error:
            say("interrupted: no file was left half-written")
            raise typer.Exit(130) from error
        except Terminated as error:
            say("terminated: no file was left half-written")
            raise typer.Exit(TERMINATED) from error


def _discard_output() -> None:
    """Let Python write nothing more to a standard output that cannot be written to."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _print_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    say(f"warning: {message}")


app = typer.Typer(
    name="visadapt",
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


def _version(requested: bool) -> None:
    if requested:
        print(__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Adapt one frozen pretrained network to many tasks with small residual adapters, one file per task.

    Exit codes: 0 success; 1 error, in one line on standard error; 2 wrong usage; 130 interrupted; 143 terminated.
    """


EXAMPLES: dict[Callable[..., None], tuple[str, ...]] = {
    sites: ("bundled/resnet50", "timm/convnext_tiny --where block"),
    summary: ("flowers.visadapt", "bundled/resnet50 --method Parallel", "bundled/minilm --m 64"),
    train: (
        "photos/ --backbone bundled/resnet50 --size 64 --m 32 --out photos.visadapt",
        "images.csv --image file --label species --backbone bundled/resnet50 --size 64 --out species.visadapt",
        "reviews.tsv --backbone bundled/minilm --text 0 --label 1 --no-header --out reviews.visadapt",
        "cifar10 --backbone bundled/resnet50 --size 64 --method Parallel --option rank=8 --out cifar10.visadapt",
    ),
    evaluate: ("photos.visadapt photos/", "tweets.visadapt tweets --metric accuracy --metric macro_f1 --json"),
    predict: (
        "rose.jpg holiday/ --task flowers.visadapt --task places.visadapt",
        "reviews.csv --text review --task tweets.visadapt",
        "- --task tweets.visadapt --format table < lines.txt",
    ),
    serve: ("tasks/ --max-tasks 64", "tasks/ --host 0.0.0.0 --port 80 --token-file token --workers 2"),
    merge: ("flowers.visadapt --out flowers.safetensors",),
    export: ("flowers.visadapt --out flowers.onnx", "tweets.visadapt --out tweets.pt2"),
    push: ("flowers.visadapt me/flowers --metric accuracy=0.93",),
    experiment: (
        "tradeoff --problem bundled/minilm:tweets --problem bundled/minilm:movies --train 1000 --results results",
        "compare --problem bundled/resnet50:cifar10 --contender 'bottleneck m=8' --contender 'full fine-tuning' "
        "--results results --processes 2",
    ),
    report: ("results --out docs/results",),
}

for command, examples in EXAMPLES.items():
    name = command.__name__
    epilog = "\n".join(["\b", "Examples:", *(f"  visadapt {name} {example}" for example in examples)])
    app.command(name, cls=Command, epilog=epilog, no_args_is_help=True)(command)
