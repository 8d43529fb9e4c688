"""A server of many tasks on one backbone, for use from one's own asyncio program."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visadapt.arguments import readable, takes
from visadapt.backbone.fingerprint import fingerprint
from visadapt.backbone.modules import unwrapped
from visadapt.checks import check_count, check_non_negative
from visadapt.errors import VisadaptError
from visadapt.opening.predicting import read_outputs
from visadapt.printable import shown
from visadapt.runtime.decider import read_decider
from visadapt.runtime.modes import keep_modes
from visadapt.serving.backbones import Backbone
from visadapt.serving.catalogue import Catalogue, Entry, model_digest
from visadapt.serving.forward import Forward, warm_up
from visadapt.serving.heap import trim_heap
from visadapt.serving.limits import Limits
from visadapt.serving.metrics import Metrics
from visadapt.serving.model_pool import ModelPool
from visadapt.serving.pool import FilePool, Pool
from visadapt.serving.preparing import prepare
from visadapt.serving.refusal import ServingError
from visadapt.serving.samples import accept
from visadapt.serving.waiting import Item, WaitingQueue
from visadapt.serving.worker import Worker
from visadapt.training.engine import check_device


@dataclass(frozen=True)
class Answer:
    """What a task predicts for one input.

    Attributes:
        task: name of the task.
        digest: SHA-256 of the version of the task that answered, in hex.
        labels: most likely first; of a regression, the names of its outputs in their order.
        scores: probabilities of these labels: a softmax over the task's classes, or a sigmoid each where an input may
            have several labels; empty for a regression.
        logits: ``(classes,)``, float32, in the order of the task's classes.
        values: outputs of a regression; empty otherwise.

    Examples:
        >>> from visadapt.serving import Answer
        >>> answer = Answer("flowers", "6f1c", ("rose", "lily"), (0.75, 0.25), torch.tensor([0.0, 1.1]))
        >>> answer.labels[0], answer.scores[0]
        ('rose', 0.75)
    """

    task: str
    digest: str
    labels: tuple[str, ...]
    scores: tuple[float, ...]
    logits: Tensor
    values: tuple[float, ...] = ()


class Server:
    """One backbone in memory that answers for many tasks; requests for any of them share a batch.

    A single worker thread runs all forwards, and loads and removes tasks between them, so that every answer is of one
    version of its task. A task file that was added, replaced or removed is served, replaced or gone from the next
    request on; at most `max_tasks` are in memory, those that were used last.

    The last bits of an answer may depend on what else is in its batch, as torch's kernels round differently for
    batches of different sizes; with ``exact=True`` every sample runs alone, and its answer is, bit for bit, what the
    task gives for this sample in any other process.

    A model that is given is in eval mode while it is served; `stop` puts its modules back into the modes that they were
    in.

    Args:
        source: an injected model, whose tasks are served; or task files and folders of task files.
        backbone: name of the backbone of task files; None for the one that the first file records.
        build: options for its loader.
        online: whether a backbone or tokenizer that only a file names may be downloaded.
        decider: file of the decider that chooses the task of inputs for ``"auto"``.
        device: None for the CPU, or for the model's own.
        max_batch: samples per forward pass.
        max_wait: seconds that a sample waits for others, at most; a server that has been idle does not wait.
        max_tasks: tasks in memory at the same time.
        exact: see above.
        limits: upper bounds of requests.

    Raises:
        VisadaptError: a file does not exist, no file records its backbone, or an option is out of bounds.

    Examples:
        >>> import asyncio
        >>> model = visadapt.inject(backbone, m=4, task="flowers", num_classes=2, labels=["iris", "lily"])
        >>> model = visadapt.inject(model, m=4, task="birds", num_classes=3, labels=["finch", "owl", "tit"])
        >>> async def main():
        ...     async with Server(model) as server:  # or Server("folder/"), whose files are loaded when asked for
        ...         image = torch.zeros(3, 64, 48, dtype=torch.uint8)
        ...         return await server.predict(["birds", "flowers"], [image, image], top=2)
        >>> [(answer.task, len(answer.labels)) for answer in asyncio.run(main())]
        [('birds', 2), ('flowers', 2)]
    """

    @takes()
    def __init__(
        self,
        source: nn.Module | str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
        *,
        backbone: str | None = None,
        build: Mapping[str, Any] | None = None,
        online: bool = False,
        decider: str | os.PathLike[str] | None = None,
        device: torch.device | str | None = None,
        max_batch: int = 32,
        max_wait: float = 0.005,
        max_tasks: int = 256,
        exact: bool = False,
        limits: Limits | None = None,
    ) -> None:
        for name, value in (("max_batch", max_batch), ("max_tasks", max_tasks)):
            check_count(value, name)
        check_non_negative(max_wait, "max_wait")
        self.limits = limits or Limits()
        self.metrics = Metrics()
        self.pool = _pool(source, Backbone(backbone, dict(build or {}), online), max_tasks, self.metrics)
        if device is not None:
            check_device(device)
        model, self._modes = self.pool.model, ExitStack()
        if device is not None:
            model.to(device)
        self.model_digest = model_digest(fingerprint(unwrapped(model)))
        chooser = None if decider is None else read_decider(model, decider)
        place = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
        self._forward = Forward(self.pool, self.metrics, place, self.limits, exact, chooser)
        self._max_batch = max_batch
        self._queue = WaitingQueue(self.limits.queue, max_batch, 0 if exact else max_wait)
        self._worker = Worker(self._queue, self._forward, self.metrics)
        self._threads = ThreadPoolExecutor(max_workers=4, thread_name_prefix="visadapt-decode")
        self.ready = False

    def start(self) -> Server:
        """Warm up and begin to answer; return the server itself."""
        if not self.ready:
            self._modes.enter_context(keep_modes(self.pool.model))
            self.pool.model.eval()
            warm_up(self._forward, min(3, self.pool.most), self._max_batch)
            trim_heap()
            self._worker.start()
            self.ready = True
        return self

    @takes()
    def stop(self, seconds: float | None = None) -> bool:
        """Refuse further requests, and answer those that wait.

        Args:
            seconds: how long to wait for them; None for as long as it takes. What is left then is refused.

        Returns:
            Whether all were answered.

        Raises:
            VisadaptError: ``seconds`` is negative or not a number.
        """
        if seconds is not None:
            check_non_negative(seconds, "seconds")
        self._queue.close()
        done = self._worker.join(seconds) if self.ready else True
        for item in self._queue.clear():
            item.fail(ServingError("stopping", "the server stops", "ask another server", retry_after=5))
        self.ready = False
        if done:
            self._modes.close()
        self._threads.shutdown(wait=False)
        return done

    async def __aenter__(self) -> Server:
        return await asyncio.get_running_loop().run_in_executor(None, self.start)

    async def __aexit__(self, *_: object) -> None:
        await asyncio.get_running_loop().run_in_executor(None, self.stop)

    async def predict(
        self, task: str | Sequence[str], inputs: Sequence[Any], *, top: int | None = None
    ) -> list[Answer]:
        """Predict the labels of some inputs.

        Args:
            task: name of the task, ``"auto"`` for the decider's choice per input, or a list with one name per input; a
                single input may be given to a list of several tasks.
            inputs: encoded images (bytes), images of Pillow, uint8 tensors ``(3, H, W)``, texts, or pairs of texts.
            top: labels per input, most likely first. None for the most likely one or, where an input may have several
                labels, those with a probability of at least 0.5.

        Returns:
            One answer per input, in their order.

        Raises:
            ServingError: there is no such task, an input cannot be decoded or is of another kind than the task takes,
                a limit is exceeded, or the server is overloaded or stopping.
        """
        names = self._checked(task, inputs, top)
        if not self.ready:
            raise ServingError("not_ready", "the server is not running", "start it, or wait", retry_after=1)
        loop = asyncio.get_running_loop()
        with self._queue.room(len(names)):
            items = await loop.run_in_executor(self._threads, self._items, names, list(inputs))
            self._queue.put(items, kept=len(names))
        try:
            found = await asyncio.gather(*(asyncio.wrap_future(item.future) for item in items))
        finally:
            for item in items:
                # of a request that is answered with an error, or whose client is gone
                item.future.cancel()
        return [_answer(entry, logits, top) for entry, logits in found]

    def entries(self) -> Iterator[tuple[str, Entry | ServingError]]:
        """Iterate over all tasks by name, with the error of those whose file cannot be used."""
        return self.pool.entries()

    def _checked(self, task: str | Sequence[str], inputs: Sequence[Any], top: int | None) -> list[str]:
        if not readable(inputs, Sequence[Any]) or not inputs:
            raise _invalid("inputs must be a list with at least one input", "send a list of inputs")
        if not readable(top, int | None) or (top is not None and not 1 <= top <= self.limits.top):
            wrong = f"top must be an integer from 1 to {self.limits.top}, got {shown(top, 50)}"
            raise _invalid(wrong, "send another top")
        if not readable(task, str | Sequence[str]) or not (isinstance(task, str) or task):
            raise _invalid("task must be a name or a list of names", "see GET /v1/tasks")
        # plain strings: those of a subclass may compare as they like
        names = [str.__str__(name) for name in ([task] if isinstance(task, str) else task)]
        count = max(len(names), len(inputs))
        if count > (most := min(self.limits.inputs, self.limits.queue)):
            message = f"a request must not have more than {most} inputs, got {count}"
            raise ServingError("too_large", message, "send several requests")
        if len(names) == 1 or isinstance(task, str):
            names *= len(inputs)
        elif len(inputs) not in (1, len(names)):
            raise _invalid(f"task must name one task per input, got {len(names)} for {len(inputs)} inputs",
                           "send as many tasks as inputs")  # fmt: skip
        return names

    def _items(self, names: list[str], inputs: list[Any]) -> list[Item]:
        """Decode and prepare the inputs of a request; in a thread beside the worker's."""
        entries = {name: self.pool.entry(self._forward.known(name)) for name in dict.fromkeys(names)}
        samples = [accept(given, self.limits) for given in inputs]
        samples = samples * len(names) if len(samples) == 1 else samples
        items: list[Item] = []
        for name, sample in zip(names, samples, strict=True):
            entry = entries[name]
            # one input for several tasks is prepared once for all that take it alike
            alike = (i for i in items if i.sample is sample and i.entry is not None and i.entry.inputs == entry.inputs)
            made = next(alike, None)
            prepared = prepare(entry, sample, self.limits) if made is None else made.prepared
            items.append(Item(name, sample, entry, prepared))
        return items


def _pool(source: Any, backbone: Backbone, most: int, metrics: Metrics) -> Pool:
    if isinstance(source, nn.Module):
        return ModelPool(source, lambda task: backbone.inputs_in(source, task))
    places = [source] if isinstance(source, str | os.PathLike) else list(source)
    catalogue = Catalogue([Path(place) for place in places], backbone.inputs)
    return FilePool(backbone.open(catalogue), catalogue, most, metrics)


def _answer(entry: Entry, logits: Tensor, top: int | None) -> Answer:
    try:
        (found,) = read_outputs(entry.name, entry.labels, entry.problem, logits[None], top)
    except VisadaptError as error:
        raise ServingError("failed", str(error), "train or save the task again") from error
    return Answer(entry.name, entry.digest, found.labels, found.probabilities, logits, found.values)


def _invalid(message: str, remedy: str) -> ServingError:
    return ServingError("invalid_request", message, remedy)
