"""Text data sets by name, and the options that describe each kind of data set."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visadapt.data.datasets_library import holds_data_files, is_stored
from visadapt.data.tables import Column, is_table

BUNDLED = ("tweets", "movies", "products", "editorials")
"""Data sets that come with the package."""


@dataclass(frozen=True)
class Preset:
    """File format of a data set as it is distributed: columns, label names, encoding."""

    text: Column | tuple[Column, Column]
    label: Column
    classes: dict[str, str]
    header: bool = True
    encoding: str = "utf-8-sig"
    delimiter: str = "\t"


PRESETS = {
    "sst2": Preset("sentence", "label", {"0": "negative", "1": "positive"}),
    "cola": Preset(3, 1, {"0": "unacceptable", "1": "acceptable"}, header=False),
    "mrpc": Preset(("#1 String", "#2 String"), "Quality", {"0": "not_equivalent", "1": "equivalent"}),
    "rte": Preset(("sentence1", "sentence2"), "label", {c: c for c in ("entailment", "not_entailment")}),
    # the distributed file names the labels, `DESC:manner How did …`; some copies number them, `0 How did …`
    "trec": Preset(
        1,
        0,
        dict(zip("012345", ("DESC", "ENTY", "ABBR", "HUM", "LOC", "NUM"), strict=True)),
        header=False,
        encoding="latin-1",
        delimiter=" ",
    ),
}
"""Data sets of GLUE, and TREC, by name."""


def options_of(name_or_path: Any, root: str | Path | None = None) -> tuple[frozenset[str], str]:
    """Return the options of `load_text` that describe a data set, and what it is, for messages.

    Args:
        name_or_path: as `load_text` takes it.
        root: as `load_text` takes it.
    """
    name = str(name_or_path) if isinstance(name_or_path, str | Path) else "the data set"
    if name in BUNDLED:
        return frozenset(), f"{name} comes with the package"
    if name in PRESETS:
        return frozenset({"root"}), f"the columns of {name} are known"
    columns = {"text", "label", "regression", "multi_label", "config"}
    if not isinstance(name_or_path, str | Path) or name.startswith("hf/"):
        return frozenset(columns), f"{name} is not a table"
    absolute = Path(name).is_absolute()
    stored = is_stored_set(at_root(name, root))
    what = f"{name} is {'not a table' if stored else 'a table'}{' and has an absolute path' if absolute else ''}"
    further = {"config"} if stored else {"header", "delimiter", "encoding"}
    return frozenset({*(columns - {"config"}), *further, *(() if absolute else ("root",))}), what


def at_root(name: str, root: str | Path | None) -> Path:
    """Return the path of a data set that may be relative to ``root``."""
    return Path(name) if root is None else Path(root, name)


def is_stored_set(path: Path) -> bool:
    """Return whether the ``datasets`` library reads a path."""
    return is_stored(path) or (holds_data_files(path) and not any(map(is_table, path.iterdir())))
