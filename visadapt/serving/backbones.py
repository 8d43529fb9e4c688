"""The backbone of a server's task files, and how their inputs are prepared for it."""

from __future__ import annotations

import dataclasses
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from visadapt.data.file_requests import vetted
from visadapt.data.hub import resolve
from visadapt.data.inputs import Inputs, TextInputs, described, from_description, inputs_of
from visadapt.errors import VisadaptError
from visadapt.serving.catalogue import Catalogue
from visadapt.task_file import read


@dataclass
class Backbone:
    """Which backbone to load: the caller's choice, or what the first file that can be read records.

    Args:
        name: as `visadapt.inject` takes it; None for the files' own.
        build: options for its loader, of the caller's choice.
        online: whether a backbone or tokenizer that only a file names may be downloaded.
    """

    name: str | None
    build: dict[str, Any]
    online: bool
    _model: nn.Module | None = None
    _tokenizers: dict[str, Any] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def open(self, catalogue: Catalogue) -> nn.Module:
        """Load the backbone in eval mode.

        Raises:
            VisadaptError: it is not given, and no file records one; or it cannot be loaded.
        """
        source, loading = (self.name, self.build) if self.name is not None else self._noted(catalogue)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self._model = resolve(source, **loading).eval()
        return self._model

    def _noted(self, catalogue: Catalogue) -> tuple[str, dict[str, Any]]:
        """What the first whole file records; the others are compared with it when they are loaded."""
        reason = "there is no task file"
        for path in catalogue.paths():
            request = self._request(path)
            if not isinstance(request, str):
                return request
            reason = request
        raise VisadaptError(f"{reason}: name the backbone with backbone= (--backbone on the command line)")

    def _request(self, path: Path) -> tuple[str, dict[str, Any]] | str:
        """Name and options of the backbone of one file, or why it cannot be known."""
        try:
            match read(path).description["notes"].get("backbone"):
                case {"name": str(name), "build": dict(build)}:
                    return vetted(str(path), name, build, self.build, online=self.online)
                case {"name": str(name), **others} if "build" not in others:
                    return vetted(str(path), name, {}, self.build, online=self.online)
            return f"{path} does not record its backbone"
        except VisadaptError as error:
            return str(error)

    def inputs(self, notes: dict[str, Any], model: nn.Module | None = None) -> Inputs:
        """Rebuild a task's inputs from the notes of its file, or from the backbone where they say nothing.

        Raises:
            VisadaptError: the notes are damaged, or name a tokenizer that no file may choose.
        """
        description = notes.get("inputs")
        if description is None:
            backbone = self._model if model is None else model
            assert backbone is not None
            description = described(inputs_of(backbone, self.name or type(backbone).__name__))
        inputs = from_description(description, backbone=self.name, online=self.online)
        if isinstance(inputs, TextInputs):
            own = inputs.loader
            # one tokenizer for all tasks: it is larger than most of them
            return dataclasses.replace(inputs, loader=lambda name: self._tokenizer(name, own))
        return inputs

    def _tokenizer(self, name: str, loader: Any) -> Any:
        with self._lock:
            if name not in self._tokenizers:
                self._tokenizers[name] = loader(name)
            return self._tokenizers[name]
