"""The backbone of a server's task files, and how their inputs are prepared for it."""

from __future__ import annotations

import dataclasses
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from visadapt.data.file_requests import vetted
from visadapt.data.inputs import Inputs, TextInputs
from visadapt.errors import VisadaptError
from visadapt.opening.backbones import open_backbone, recorded_backbone
from visadapt.opening.preparing import noted_inputs, preprocess
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
    _recorded: str | None = None
    _tokenizers: dict[str, Any] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def open(self, catalogue: Catalogue) -> nn.Module:
        """Load the backbone in eval mode, as `visadapt.open` does.

        Raises:
            VisadaptError: it is not given, and no file records one; or it cannot be loaded.
        """
        source, loading = (self.name, self.build) if self.name is not None else self._noted(catalogue)
        self._model = open_backbone(source, loading)
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
            recorded = recorded_backbone(read(path).description["notes"])
            if recorded is None:
                return f"{path} does not record its backbone"
            place = vetted(str(path), *recorded, self.build, online=self.online)
            self._recorded = recorded[0]
            return place
        except VisadaptError as error:
            return str(error)

    def inputs(self, task: str, notes: dict[str, Any]) -> Inputs:
        """Rebuild the inputs of a task file from its notes, as `visadapt.preprocess` does.

        Raises:
            VisadaptError: the notes are damaged, name a tokenizer that no file may choose, or say nothing where the
                backbone does not either.
        """
        assert self._model is not None
        return self._shared(noted_inputs(self._model, task, notes, self.name, self.name or self._recorded, self.online))

    def inputs_in(self, model: nn.Module, task: str) -> Inputs:
        """Return the inputs of a task of a model in memory; see `visadapt.preprocess`."""
        return self._shared(preprocess(model, task, backbone=self.name, online=self.online).inputs)

    def _shared(self, inputs: Inputs) -> Inputs:
        """The same inputs with one tokenizer for all tasks: it is larger than most of them."""
        if isinstance(inputs, TextInputs):
            own = inputs.loader
            return dataclasses.replace(inputs, loader=lambda name: self._tokenizer(name, own))
        return inputs

    def _tokenizer(self, name: str, loader: Any) -> Any:
        with self._lock:
            if name not in self._tokenizers:
                self._tokenizers[name] = loader(name)
            return self._tokenizers[name]
