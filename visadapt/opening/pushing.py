"""Share task files in a repository of the Hugging Face hub."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn

from visadapt.arguments import takes
from visadapt.checks import is_real
from visadapt.errors import VisadaptError
from visadapt.opening.card import model_card
from visadapt.opening.repository import PREFIX, SUFFIX
from visadapt.optional import require
from visadapt.runtime.registry import registry_of
from visadapt.task_file import save


@takes()
def push_to_hub(
    model: nn.Module,
    task: str | Sequence[str],
    repository: str,
    *,
    metrics: Mapping[str, float] | None = None,
    license: str | None = None,
    card: bool = True,
    private: bool | None = None,
    revision: str | None = None,
    message: str | None = None,
) -> str:
    """Upload a task to a repository of the Hugging Face hub, with a model card, in one commit.

    The repository is made if it does not exist. It gets ``<task>.visadapt`` and a ``README.md`` that says the method,
    size, backbone, labels, metrics and how to load it. huggingface_hub does the transfer: ``hf auth login`` or
    ``HF_TOKEN`` for the account, ``HF_ENDPOINT`` for another hub.

    Args:
        model: an injected model.
        task: name of the task, or of several; the card describes the tasks of one call.
        repository: ``"user/repo"``.
        metrics: for the card, by name; None for the task's note ``metrics``. For a single task only.
        license: identifier for the card, such as ``"apache-2.0"``.
        card: whether to write ``README.md``, replacing the repository's.
        private: whether a new repository is private; None for the account's default.
        revision: branch to commit to; None for the main one.
        message: of the commit.

    Returns:
        The repository at the new commit, ``"hub:user/repo@<commit>"``, as `visadapt.open` takes it.

    Raises:
        VisadaptError: the model has no such task, a name is not that of a repository, a license or a branch, or the
            upload fails.

    Examples:
        >>> # needs an account: visadapt.push_to_hub(model, "flowers", "user/flowers", metrics={"accuracy": 0.93})
        >>> model = visadapt.inject(backbone, m=4, task="flowers", num_classes=3)
        >>> visadapt.push_to_hub(model, "flowers", "flowers")
        Traceback (most recent call last):
            ...
        visadapt.errors.VisadaptError: repository must be 'user/repo', got 'flowers'
    """
    registry = registry_of(model)
    names = [registry.task(name).name for name in ([task] if isinstance(task, str) else task)]
    _check(names, repository, metrics)
    _check_words(license, revision)
    hub = require("huggingface_hub", "push_to_hub", "visadapt[hub]")
    with tempfile.TemporaryDirectory() as folder:
        files = {name: save(model, name, Path(folder, f"{name}{SUFFIX}")) for name in names}
        uploads = {path.name: path for path in files.values()}
        if card:
            uploads["README.md"] = Path(folder, "README.md")
            uploads["README.md"].write_text(model_card(model, files, repository, metrics, license), encoding="utf-8")
        try:
            api = hub.HfApi(library_name="visadapt")
            api.create_repo(repository, private=private, exist_ok=True)
            operations = [hub.CommitOperationAdd(name, str(path)) for name, path in uploads.items()]
            commit = api.create_commit(
                repository, operations, commit_message=message or f"Add {', '.join(names)}", revision=revision
            )
        except Exception as error:  # errors of HTTP, of the name and of the account have no common class
            raise VisadaptError(f"cannot push to {repository!r}: {' '.join(str(error).split())}") from error
    return f"{PREFIX}{repository}@{commit.oid}"


def _check(names: list[str], repository: object, metrics: Mapping[str, float] | None) -> None:
    if not names:
        raise VisadaptError("task must name at least one task to push")
    if not isinstance(repository, str) or not re.fullmatch(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*", repository):
        raise VisadaptError(f"repository must be 'user/repo', got {repository!r}")
    if metrics is not None and len(names) > 1:
        raise VisadaptError("metrics= applies to a single task: keep them in the note 'metrics' of each")
    for name, value in (metrics or {}).items():
        if not isinstance(name, str) or not is_real(value):
            raise VisadaptError(f"metrics must be finite numbers by name, got {name!r}: {value!r}")


def _check_words(license: str | None, revision: str | None) -> None:
    if license is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.+_-]{0,99}", license):
        raise VisadaptError(f"license must be an identifier, such as 'apache-2.0', got {license!r:.200}")
    # what git takes for a branch
    if revision is not None and not re.fullmatch(
        r"(?!.*(\.\.|//|/\.|\.lock$|[./]$))[A-Za-z0-9_][\w./-]{0,199}", revision
    ):
        raise VisadaptError(f"revision must be the name of a branch, such as 'main', got {revision!r:.200}")
