"""Backbones and tokenizers that a file names, loaded with no more than the file may ask for.

Nothing here runs code of a repository, unpickles, or reads a local path of the file's choice. The network is used only
if the caller allows it; otherwise weights must be bundled or in the local cache of their library.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch

from visadapt.data import minilm_path, tokenizer_of
from visadapt.data.allowlist import SIZES, may_name, objections
from visadapt.data.hub import WEIGHTLESS, resolve
from visadapt.data.pretrained import unfilled
from visadapt.data.processors import processor_of
from visadapt.data.repository_config import CONFIG, model_objections, processor_objections, read_config
from visadapt.errors import VisadaptError, option
from visadapt.limits import check_limit, limit
from visadapt.optional import require

# neither code nor pickles; files in subfolders are of other frameworks
_FILES = ("*.json", "*.txt", "*.model", "*.tiktoken", "*.safetensors")

PROCESSOR = "preprocessor_config.json"


def by_hand() -> str:
    """Say how the caller may choose what a file may not."""
    return f"if you trust it, give it yourself by {option('backbone', 'NAME')} and {option('build', 'KEY=VALUE')}"


def vetted(
    source: str, name: str, build: Mapping[str, Any], given: Mapping[str, Any] | None = None, *, online: bool = False
) -> tuple[str, dict[str, Any]]:
    """The name and options to load a backbone with that a file names.

    Args:
        source: where the name stands, for messages.
        name: of the backbone, as the file has it.
        build: options for its loader, as the file has them.
        given: options that the caller gives; they replace the file's and are not checked.
        online: whether weights that are not on this machine may be downloaded.

    Returns:
        Arguments of `visadapt.data.hub.resolve`.

    Raises:
        VisadaptError: the file asks for what no file may choose; the weights are not on this machine.
    """
    given = given or {}
    refused = objections(name, {key: value for key, value in build.items() if key not in given})
    if refused:
        raise VisadaptError(f"{source} must not choose {', '.join(refused)}: {by_hand()}")
    place, _, rest = name.partition("/")
    options = {**build, **given}
    sizes = {key: value for key, value in build.items() if key in SIZES and key not in given}
    if place == "hf":
        folder = _snapshot(name, online, options.pop("revision", None))
        _check_whole(name, folder, online)
        _check_config(name, folder, CONFIG, model_objections)
        _check_size(source, name, sizes, folder)
        return f"hf/{folder}", {"trust_remote_code": False, "use_safetensors": True, "weights_only": True, **options}
    _check_size(source, name, sizes, minilm_path() if name == "bundled/minilm" else None)
    if place == "timm":
        return name, _timm(name, rest, options, online)
    if place == "torchvision":
        _torchvision(name, rest, options, online)
    return name, options


def tokenizer(name: str, *, online: bool = False) -> Any:
    """The tokenizer that a file names.

    Args:
        name: ``"bundled/minilm"`` or ``"hf/<repository>"``.
        online: whether it may be downloaded.

    Raises:
        VisadaptError: the name is a path; the tokenizer is not on this machine, or needs code of its own.
    """
    check_tokenizer(name)
    folder = name if name.startswith("bundled/") else f"hf/{_snapshot(name, online)}"
    return tokenizer_of(folder, trust_remote_code=False)


def image_processor(name: str, *, online: bool = False) -> Any:
    """The image processor of a backbone that a file names; None if it has none.

    Args:
        name: of the backbone.
        online: whether it may be downloaded.

    Raises:
        VisadaptError: it is not on this machine, or its configuration asks for what no file may choose.
    """
    if not name.startswith("hf/"):
        return None
    folder = _snapshot(name, online)
    if not (folder / PROCESSOR).is_file():
        return None
    _check_config(name, folder, PROCESSOR, processor_objections)
    return processor_of(f"hf/{folder}", trust_remote_code=False)


def check_tokenizer(name: str) -> None:
    """Refuse names of tokenizers that no file may choose."""
    if not (name == "bundled/minilm" or (name.startswith("hf/") and may_name(name))):
        raise VisadaptError(f"a file must not choose the tokenizer {name!r:.200} (a local path, or not a plain name): "
                            f"{by_hand()}")  # fmt: skip


def _absent(name: str, what: str) -> VisadaptError:
    return VisadaptError(
        f"{what} of {name!r}, which a file names, must be on this machine: {option('online')} downloads them, or "
        f"{by_hand()}"
    )


def _snapshot(name: str, online: bool, revision: str | None = None) -> Path:
    """The folder of a repository in the cache: read as a folder, none of its files refers to another repository."""
    hub = require("huggingface_hub", name, "huggingface_hub")
    try:
        folder = Path(hub.snapshot_download(name.removeprefix("hf/"), revision=revision, local_files_only=not online,
                                        allow_patterns=list(_FILES), ignore_patterns=["*/*"]))  # fmt: skip
    except Exception as error:  # errors of the cache, of HTTP and of the name have no common class
        if online:
            raise VisadaptError(f"cannot download {name!r}: {error}") from error
        raise _absent(name, "the files") from error
    return folder


def _check_whole(name: str, folder: Path, online: bool) -> None:
    if (folder / "adapter_config.json").exists():
        # such a repository names a base model of its own choice
        raise VisadaptError(f"{name!r}, which a file names, must be a whole model, not an adapter: {by_hand()}")
    weights = any((folder / file).is_file() for file in ("model.safetensors", "model.safetensors.index.json"))
    if weights and (folder / "config.json").is_file():
        return
    if online:
        raise VisadaptError(
            f"{name!r}, which a file names, must have a config.json and safetensors weights: {by_hand()}"
        )
    raise _absent(name, "the safetensors weights")


def _check_config(name: str, folder: Path, file: str, objections_to: Callable[[dict[str, Any]], list[str]]) -> None:
    refused = objections_to(read_config(folder / file))
    if refused:
        raise VisadaptError(f"the {file} of {name!r} must not choose {', '.join(refused)}: {by_hand()}")


def _check_size(source: str, name: str, sizes: Mapping[str, Any], folder: Path | None) -> None:
    """Refuse a backbone that a file makes much larger than it is by its name, or than its stored weights."""
    if not sizes and folder is None:
        return
    try:
        size = _bytes(name, sizes, folder)
        usual = 0 if size <= limit("BACKBONE_BYTES") else _bytes(name, {}, None) if folder is None else _stored(folder)
    except Exception as error:  # each library has its own errors for sizes that do not fit together
        chosen = ", ".join(f"{key}={value!r:.60}" for key, value in sizes.items())
        what = f"{name!r} cannot be built with {chosen}, as {source} asks" if chosen else f"cannot load {name!r}"
        raise VisadaptError(f"{what}: {error}") from error
    if size > 1.5 * usual:
        check_limit(size, "BACKBONE_BYTES", f"{name!r}, as {source} asks for it,")


def _stored(folder: Path) -> int:
    """What the stored weights take in memory: at most 4 bytes for each that is stored, as float32 for float8."""
    return 4 * sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _bytes(name: str, sizes: Mapping[str, Any], folder: Path | None) -> int:
    """What a backbone takes in memory, by building it on the meta device."""
    with torch.device("meta"):
        if folder is None:
            model = resolve(name, **{**WEIGHTLESS.get(name.partition("/")[0], {}), **sizes})
        else:
            model = unfilled(str(folder), **sizes)
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def _timm(name: str, rest: str, options: dict[str, Any], online: bool) -> dict[str, Any]:
    timm = require("timm", name, "timm")
    own = options.keys() & {"pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path"}
    if online or own or not options.get("pretrained", True) or not timm.is_model(rest.partition(".")[0]):
        return options
    try:
        published = timm.models.get_pretrained_cfg(rest)
    except RuntimeError:  # no such tag, as the loader will say
        return options
    if published is None or not (published.hf_hub_id or published.url):
        return options
    if not published.hf_hub_id:
        if not _in_torch_hub(published.url):
            raise _absent(name, "the weights")
        return options
    repository, _, revision = published.hf_hub_id.partition("@")
    hub = require("huggingface_hub", name, "huggingface_hub")
    files = [published.hf_hub_filename] if published.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]
    for file in files:
        cached = hub.try_to_load_from_cache(repository, file, revision=revision or None)
        if isinstance(cached, str):
            # by its path: timm would ask the hub whether the file is the newest
            return {**options, "pretrained_cfg_overlay": {"file": cached, "custom_load": False}}
    raise _absent(name, "the weights")


def _torchvision(name: str, rest: str, options: dict[str, Any], online: bool) -> None:
    models = require("torchvision.models", name, "torchvision")
    if rest not in models.list_models(module=models):
        raise VisadaptError(f"{name!r}, which a file names, must be a classifier of torchvision: {by_hand()}")
    weights = options.get("weights", "DEFAULT")
    if online or weights is None:
        return
    known = models.get_model_weights(rest)
    entry = known.__members__.get(str(weights).removeprefix(f"{known.__name__}."))
    if entry is not None and not _in_torch_hub(entry.url):
        raise _absent(name, "the weights")


def _in_torch_hub(url: str) -> bool:
    return Path(torch.hub.get_dir(), "checkpoints", Path(urlparse(url).path).name).is_file()
