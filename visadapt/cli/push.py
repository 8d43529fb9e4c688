"""``visadapt push``."""

from __future__ import annotations

from typing import Annotated

import typer

import visadapt
from visadapt.cli.given import refuse_unused
from visadapt.cli.one_task import open_one
from visadapt.cli.options import Build, Online, OtherBackbone, TaskFile, pairs


def push(
    task: TaskFile,
    repository: Annotated[str, typer.Argument(help="Repository of the Hugging Face hub: user/repo.")],
    metric: Annotated[
        list[str] | None,
        typer.Option("--metric", metavar="NAME=VALUE", help="Metric for the card, such as accuracy=0.93; repeatable."),
    ] = None,
    license: Annotated[str | None, typer.Option(help="License for the card, such as apache-2.0.")] = None,
    card: Annotated[bool, typer.Option("--card/--no-card", help="Whether to write the repository's README.md.")] = True,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to commit to; default: main.")] = None,
    backbone: OtherBackbone = None,
    build: Build = None,
    online: Online = False,
) -> None:
    """Upload a task file to the Hugging Face hub, with a model card.

    Prints the repository at the new commit, as the other commands take it in place of a task file. The account is that
    of `hf auth login` or HF_TOKEN.
    """
    if not card:
        refuse_unused("--no-card writes no README.md", "metric", "license")
    model, name = open_one(task, backbone, pairs(build, "--build"), online)
    pushed = visadapt.push_to_hub(
        model,
        name,
        repository,
        metrics=pairs(metric, "--metric") or None,
        license=license,
        card=card,
        private=private or None,
        revision=revision,
    )
    print(pushed)
