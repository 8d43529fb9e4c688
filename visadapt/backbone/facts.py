"""Facts about a backbone, each established once and then looked up by name."""

from __future__ import annotations

import dataclasses
import threading
from functools import cached_property
from typing import Any

import torch
from torch import nn

from visadapt.backbone.entry import WHOLE, Entry
from visadapt.backbone.find import find_sites
from visadapt.backbone.heads import Head, find_head, traced_head
from visadapt.backbone.known_batches import KnownBatches
from visadapt.backbone.modules import own_modules, within
from visadapt.backbone.norms import find_norms
from visadapt.backbone.site import Sites
from visadapt.backbone.state import Label, State
from visadapt.errors import VisadaptError

_LOCK = threading.Lock()

_FOUND = ("known_head", "norms")
"""Facts that are found in the modules, and only then kept."""

_STATES = 4
"""How many states of a model are kept with their row facts."""


class Facts:
    """The modules, head, norms and sites of one backbone, each found when first asked for.

    Args:
        model: the backbone, injected or not; it is not changed.

    Attributes:
        model: the backbone.
        batches: which rows belong to which sample, for each kind of batch seen so far.
        entries: the same for batches that entered through other methods than its forward.
        hooked: the modules that had hooks when the last mixed batch began.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._traced_head: Head | None = None
        # of the model when no input could be guessed on which it runs
        self._unguessed: State | None = None
        self.batches = KnownBatches()
        self.entries: dict[Entry, KnownBatches] = {}
        self.hooked: list[nn.Module] = []
        self._state: State | None = None
        self._copied_current = False
        self._states: list[tuple[State, KnownBatches, dict[Entry, KnownBatches]]] = []

    def __getstate__(self) -> dict[str, Any]:
        # a copy has no state before its first batch, and is taken for what its model was. It looks for its modules
        # itself: a graph of torch.fx among them cannot be pickled by what is inside of it
        kept = {**self.__dict__, "_copied_current": self.are_current()}
        gone = ("modules",) if self.hold() else ("modules", *_FOUND)
        return {name: value for name, value in kept.items() if name not in gone}

    @cached_property
    def modules(self) -> dict[str, nn.Module]:
        """The backbone's modules by path, without those of tasks, as they were when last looked for."""
        return own_modules(self.model)

    @property
    def name(self) -> str:
        """Name of the backbone's class, for messages."""
        return type(self.model).__name__

    def hold(self) -> bool:
        """Whether the backbone still consists of the same modules at the same paths."""
        return own_modules(self.model) == self.modules

    def of_batches(self, entry: Entry = WHOLE) -> KnownBatches:
        """The row facts of batches that enter by a method, found anew if anything was changed that steers a forward."""
        if self._state is None or not self._state.holds():
            with _LOCK:
                self._renew()
        return self.batches if entry == WHOLE else self.entries.setdefault(entry, KnownBatches(entry))

    def are_current(self) -> bool:
        """Return whether nothing that steers a forward was changed since the last batch of mixed tasks."""
        if self._state is None:
            return self._copied_current
        if not self.hold():
            return False
        ignored = self._moving()
        return self._state.holds() or not State(self.modules, ignored).changes(self._state, ignored)

    def _moving(self) -> frozenset[Label]:
        """Return the attributes that forwards were seen to set anew each time."""
        known = [(self.batches, self.entries), *[state[1:] for state in self._states]]
        every = [batches for whole, entries in known for batches in (whole, *list(entries.values()))]
        return frozenset[Label]().union(*[batches.moving for batches in every])

    def _renew(self) -> None:
        """Look up the row facts of the model in its present state, or begin new ones."""
        if not self.hold():
            self.modules, self._traced_head = own_modules(self.model), None
            for name in _FOUND:
                self.__dict__.pop(name, None)
        if self._state is None:
            # the first batch, of a copy too
            self._states = []
        else:
            self._states = [(self._state, self.batches, self.entries), *self._states][:_STATES]
        ignored = self._moving()
        now = State(self.modules, ignored)
        self.hooked = now.hooked
        known = next((known for known in self._states if not now.changes(known[0], ignored)), None)
        # batches that run meanwhile keep theirs
        self.batches, self.entries = (KnownBatches(), {}) if known is None else known[1:]
        if known is not None:
            self._states.remove(known)
        self._state = now

    @cached_property
    def known_head(self) -> Head | None:
        """The head as its library names it, without modules if it has none; None if no library does."""
        return find_head(self.model, self.modules)

    def trace_head(self, example: Any = None) -> Head | None:
        """The head as one forward on fake tensors shows it, kept after the first success; None if none succeeded.

        Each batch of mixed tasks asks for it, so where the model runs on no input that can be guessed, none is tried
        again until something changes.

        Args:
            example: an input; guessed if None.
        """
        tried = example is None and self._unguessed is not None and self._unguessed.holds()
        if self._traced_head is None and not tried:
            try:
                self._traced_head = traced_head(self.model, self.modules, example)
            except VisadaptError:
                if example is None:
                    self._unguessed = State(self.modules)
        return self._traced_head

    def look_for_head(self, example: Any = None) -> Head | None:
        """The head as its library names it, or as a trace shows it where none does.

        Returns:
            The head, without modules if it is known that there is none; None if that could not be established.
        """
        known = self.known_head
        if known is None:
            return self.trace_head(example)
        if known.modules and not known.finals and not known.obstacle:
            traced = self.trace_head(example)
            finals = [final for final in (traced.finals if traced else ()) if within(final.path, known.modules)]
            return dataclasses.replace(known, finals=tuple(finals))
        return known

    @property
    def head(self) -> Head | None:
        """Where its head is; None if it has none, or none that can be established."""
        head = self.look_for_head()
        return head if head is not None and head.modules else None

    @cached_property
    def norms(self) -> dict[str, nn.Module]:
        """Every norm with parameters of its own, by path."""
        return find_norms(self.modules)

    def sites(self, example: Any = None) -> Sites:
        """All sites, sorted by where they come in the backbone.

        Args:
            example: an input to trace with, where no family knows the backbone and its input cannot be guessed.

        Raises:
            VisadaptError: no family knows the backbone and it does not run on the example, or on a guessed input.
        """
        found, head = find_sites(self.model, self.modules, self.known_head, example)
        # one forward shows both, and on the caller's example rather than on a guess
        self._traced_head = self._traced_head or head
        return found

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of adapters: fp64 for a backbone in fp64, fp32 for every other."""
        parameters = (p for m in self.modules.values() for p in m._parameters.values() if p is not None)
        return torch.float64 if {p.dtype for p in parameters} == {torch.float64} else torch.float32

    @property
    def head_modules(self) -> tuple[str, ...]:
        """Paths of the modules that are its head; none if it has none that can be found."""
        head = self.head  # finding the head may take a trace
        return () if head is None else head.modules

    @property
    def size(self) -> int:
        """Number of parameters outside the head, each counted once; fractions of the backbone refer to it."""
        head = self.head_modules
        outside = {p for path, m in self.modules.items() if not within(path, head) for p in m._parameters.values()}
        return sum(p.numel() for p in outside if p is not None)
