"""A new head starts as the linear probe, on features that are computed once (LP-FT, Kumar et al. 2022)."""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from visadapt.backbone.modules import relative, unwrapped, within
from visadapt.runtime.drawn import bits_of
from visadapt.runtime.modes import keep_modes
from visadapt.runtime.registry import registry_of
from visadapt.training.batches import Batches
from visadapt.training.engine import LogitsModel
from visadapt.training.evaluation import run_epoch
from visadapt.training.losses import Objective, width_of
from visadapt.training.target import Target

LIMIT = 1 << 28
"""Numbers that the features may have, 2 GiB in double precision."""

PENALTIES = (3000.0, 1000.0, 300.0, 100.0, 30.0, 10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01)
"""L2 penalties on scaled features to choose from, strongest first, on a fifth of the samples."""

RESOLUTION = 1e-3
"""Share of the features' size that they are at least taken to vary by."""

KEPT = 32
"""Number of solutions to remember, of at most a few MB each."""


class Unsuited(Exception):  # noqa: N818  a reason, not an error
    """Why a head cannot start as a linear probe."""


def start_with_head(
    model: nn.Module,
    task: str | None,
    logits_model: LogitsModel,
    target: Target,
    batches: Batches,
    seed: int,
    after_batch: Callable[[str], None] = lambda text: None,
) -> str:
    """Fit the head of a task to the features that the model computes now, in eval mode, without augmentation.

    Multinomial logistic regression, or whatever else the loss makes of a linear model, with an L2 penalty that is
    chosen on a fifth of the samples (Kumar et al. 2022, arXiv 2202.10054, §3.4). Done only for a head that is new,
    untouched since ``inject``, one linear layer, and the last thing that the model computes.

    Where dropout changes the features by more than the samples differ, as in a backbone that was not pretrained, such a
    head would start training with a loss of hundreds. Its outputs are then scaled down: those of classes as a whole,
    which changes no decision in eval mode, other ones around their mean.

    Args:
        model: the model.
        task: its task; None for a plain model.
        logits_model: the same model as training runs it.
        target: what training may change.
        batches: the training data.
        seed: of the samples that the penalty is chosen on.
        after_batch: called after each batch of features, with a text to display.

    Returns:
        What was done, in words, or why nothing was.
    """
    try:
        head = _new_head(model, task)
        found = _features(head, logits_model, target, batches, after_batch)
        loss = fit_linear(head, found.inputs, found.labels, batches.objective, seed)
    except Unsuited as reason:
        return f"no linear probe: {reason}"
    logits_model.engine.broadcast([p.data for p in head.parameters()])
    scale = _damped(head, found, logits_model, target, batches.objective)
    logits_model.engine.broadcast([p.data for p in head.parameters()])
    return f"linear probe, loss {loss:.4f}" + ("" if scale == 1 else f" before scaling by {scale:.2g} for dropout")


def _new_head(model: nn.Module, task: str | None) -> nn.Linear:
    if task is None:
        raise Unsuited("whether the head of a plain model is new is not known")
    registry = registry_of(model)
    spec = registry.task(task)
    if spec.head != "new" or spec.head_at is None:
        raise Unsuited("the head is not new")
    parts = {path: own["head"] for path, own in registry.parts(task).items() if "head" in own}
    finals = spec.head_at.finals
    path = next((p for p in parts if finals and within(finals[0].path, [p])), None)
    if len(parts) != 1 or len(finals) != 1 or path is None:
        raise Unsuited("the head is not one layer")
    layer = parts[path].get_submodule(relative(finals[0].path, path))
    others = {id(p) for p in parts[path].parameters()} - {id(p) for p in layer.parameters()}
    if not isinstance(layer, nn.Linear) or others:
        raise Unsuited("the head is not one linear layer")
    if not all(p.requires_grad for p in layer.parameters()):
        raise Unsuited("the head does not require a gradient")
    if spec.drawn is None or spec.drawn != bits_of(parts.values()):
        raise Unsuited("the head was changed since inject")
    return layer


@dataclass
class _Found:
    """What enters a head.

    Attributes:
        inputs: of the head, ``(N, D)``, on the CPU.
        labels: of the same samples.
        batch: the first batch as the model takes it, on its device.
        rows: number of samples of that batch, in all processes.
    """

    inputs: Tensor
    labels: Tensor
    batch: Any
    rows: int


def _features(
    head: nn.Linear,
    logits_model: LogitsModel,
    target: Target,
    batches: Batches,
    after_batch: Callable[[str], None],
) -> _Found:
    """Compute what enters the head, for all samples."""
    seen: list[Tensor] = []
    features: list[Tensor] = []
    all_labels: list[Tensor] = []
    first: list[Any] = []
    name, objective, engine = type(unwrapped(logits_model.model)).__name__, batches.objective, logits_model.engine

    def use(outputs: Tensor, labels: Tensor | None) -> None:
        assert labels is not None
        objective.check(outputs, labels, batches.purpose, name)
        objective.check_labels(labels, width_of(outputs), batches.purpose)
        if len(seen) != 1 or seen[0].ndim != 2:
            raise Unsuited("its input is not one vector per sample")
        (part,) = seen
        seen.clear()
        part = engine.gather(part)[: len(labels)]
        if len(part) != len(labels):
            raise Unsuited("its input is not one vector per sample")
        if not features:
            with torch.autocast(part.device.type, enabled=False):
                expected = F.linear(part.float(), head.weight.float(), None if head.bias is None else head.bias.float())
            scale = float(outputs.abs().max())
            if outputs.shape != expected.shape or float((expected.cpu() - outputs).abs().max()) > 0.05 * scale:
                raise Unsuited("the outputs are not those of the head")
        features.append(part.float().cpu())
        all_labels.append(labels)
        count = sum(map(len, features)) if batches.samples is None else len(batches.samples)
        if count * part.shape[1] > LIMIT:
            raise Unsuited(f"the features of {count:,} samples take more than {LIMIT * 8 / 1e9:.1f} GB")
        after_batch("features of the head")

    def note(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        if not first:
            first.append(arguments[0])

    handles = (
        head.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach())),
        logits_model.register_forward_pre_hook(note),
    )
    try:
        run_epoch(logits_model, target, batches, use)
    finally:
        for handle in handles:
            handle.remove()
    return _Found(torch.cat(features), torch.cat(all_labels), first[0], len(features[0]))


def _as_trained(model: nn.Module) -> None:
    """Let modules draw random numbers as in training, but keep the statistics of norms."""
    model.train()
    for module in model.modules():
        if isinstance(getattr(module, "running_mean", None), Tensor):
            module.eval()


SCALES = tuple(2.0**-k for k in range(24))
"""Factors to scale the outputs of a head with."""

WORSE = 1.05
"""Loss under dropout that a scaled head may have, relative to that of a head that tells nothing apart."""


@torch.no_grad()
def _damped(head: nn.Linear, found: _Found, logits_model: LogitsModel, target: Target, objective: Objective) -> float:
    """Scale down a head that, on the first batch as training computes it, is worse than one that tells nothing apart.

    Returns:
        The factor: 1 for a head that is better, and is left as it is.
    """
    seen: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    engine = logits_model.engine
    try:
        with (
            target.context(),
            keep_modes(logits_model.model),
            torch.random.fork_rng(devices=[engine.device] if engine.device.type == "cuda" else []),
        ):
            _as_trained(logits_model)
            logits_model(found.batch)
    finally:
        handle.remove()
    drawn, labels = engine.gather(seen[0])[: found.rows].float().cpu(), found.labels[: found.rows]
    weight, bias = head.weight.float().cpu(), None if head.bias is None else head.bias.float().cpu()
    outputs = F.linear(drawn, weight, bias)
    constant = F.linear(found.inputs.mean(0), weight, bias)
    if not callable(objective.loss) and objective.kind(labels) != "mse":
        constant = torch.zeros_like(constant)

    def loss(scale: float) -> float:
        return float(objective.losses(torch.lerp(constant.expand_as(outputs), outputs, scale), labels).mean())

    if bias is None or loss(1) <= loss(0):
        return 1.0
    scale = next((each for each in SCALES if loss(each) <= WORSE * loss(0)), SCALES[-1])
    head.weight.mul_(scale)
    head.bias.copy_(torch.lerp(constant, bias, scale))
    return scale


@dataclass
class _Problem:
    """A linear model on scaled features in double precision, on the device of the head."""

    features: Tensor
    labels: Tensor
    objective: Objective
    bias: bool

    def loss(self, weight: Tensor, bias: Tensor) -> Tensor:
        return self.objective.losses(F.linear(self.features, weight, bias if self.bias else None), self.labels).mean()

    def solve(self, penalty: float, start: tuple[Tensor, Tensor], steps: int = 100) -> tuple[Tensor, Tensor]:
        """Minimise the mean loss and half the penalty times the squared weights, over the number of features."""
        weight, bias = (t.clone().requires_grad_(True) for t in start)
        optimizer = torch.optim.LBFGS(
            [weight, bias] if self.bias else [weight],
            max_iter=steps,
            # with torch's 100 the updates of a wide head take most of the time
            history_size=10,
            tolerance_grad=1e-6,
            tolerance_change=1e-9,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Any:
            optimizer.zero_grad()
            loss = self.loss(weight, bias) + penalty / 2 * weight.square().sum() / weight.shape[1]
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        with torch.enable_grad():
            optimizer.step(closure)  # type: ignore[no-untyped-call]
        return weight.detach(), bias.detach()

    def part(self, rows: Tensor) -> _Problem:
        return _Problem(self.features[rows], self.labels[rows], self.objective, self.bias)


@torch.no_grad()
def fit_linear(head: nn.Linear, features: Tensor, labels: Tensor, objective: Objective, seed: int) -> float:
    """Set a linear layer to the minimum of the regularised loss on features.

    Args:
        head: the layer, changed in place.
        features: what enters it, ``(N, D)``.
        labels: as the objective takes them.
        objective: the loss.
        seed: of the samples that the penalty is chosen on.

    Returns:
        The mean loss, without the penalty.

    Raises:
        Unsuited: the loss is not finite, or not smaller than that of a layer of zeros; nothing is changed then.
    """
    device = head.weight.device
    # the caller's own loss may hold tensors of the usual dtype
    exact = device.type != "mps" and not callable(objective.loss)
    dtype = torch.float64 if exact else torch.float32
    x = features.to(device, dtype)
    has_bias = head.bias is not None
    mean = x.mean(0) if has_bias else torch.zeros_like(x[0])
    spread = (x - mean).square().mean(0).sqrt()
    # at least the average one: weights of features that hardly vary would be large, and any change of these features,
    # by augmentation, dropout or adapters, would be magnified
    average = float(spread.square().mean().sqrt())
    # what varies less than that is rounding: it differs from one batch size to the next
    noise = RESOLUTION * float(x.square().mean().sqrt())
    least = max(average, noise)
    spread = spread.clamp(min=least) if least > 0 else torch.ones_like(spread)
    whole = _Problem((x - mean) / spread, labels.to(device), objective, has_bias)
    zero = torch.zeros_like(head.weight, dtype=dtype), torch.zeros(head.out_features, device=device, dtype=dtype)
    start = float(whole.loss(*zero))
    if not math.isfinite(start):
        raise Unsuited(f"the loss of a layer of zeros is {start:.4g}")
    key = _digest(head, x, labels, objective, seed)
    known = None if key is None else _SOLVED.get(key)
    weight, bias = whole.solve(*_choose(whole, zero, seed)) if known is None else (t.to(device) for t in known)
    if key is not None:
        _remember(key, (weight, bias))
    loss = float(whole.loss(weight, bias))
    # where the features say nothing, the two are equal up to rounding
    if not math.isfinite(loss) or loss > start + 1e-6 * max(1.0, abs(start)):
        raise Unsuited(f"the loss on the features became {loss:.4g}, from {start:.4g}")
    head.weight.copy_(weight / spread)
    if has_bias:
        head.bias.copy_(bias - (weight / spread) @ mean)
    return loss


_SOLVED: OrderedDict[str, tuple[Tensor, Tensor]] = OrderedDict()
"""The latest solutions: training runs at several learning rates start from the same one."""


def _digest(head: nn.Linear, features: Tensor, labels: Tensor, objective: Objective, seed: int) -> str | None:
    """What a solution depends on; None with a loss of the caller's own."""
    if callable(objective.loss):
        return None
    digest = hashlib.sha256(repr((head.out_features, head.bias is None, features.shape, objective, seed)).encode())
    for tensor in (features, labels):
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _remember(key: str, solved: tuple[Tensor, Tensor]) -> None:
    weight, bias = solved
    _SOLVED[key] = weight.cpu(), bias.cpu()
    while len(_SOLVED) > KEPT:
        _SOLVED.popitem(last=False)


def _choose(whole: _Problem, zero: tuple[Tensor, Tensor], seed: int) -> tuple[float, tuple[Tensor, Tensor]]:
    """The penalty with the smallest loss on a fifth of the samples, and the solution on the others.

    Weaker ones are tried until two in a row are worse than the best. With fewer than twenty samples, 10 and zero.
    """
    count = len(whole.labels)
    if count < 20:
        return 10.0, zero
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).to(whole.labels.device)
    held_out, rest = whole.part(order[: count // 5]), whole.part(order[count // 5 :])
    best, chosen, worse, solution = math.inf, (PENALTIES[0], zero), 0, zero
    for penalty in PENALTIES:
        solution = rest.solve(penalty, solution, steps=30)
        loss = float(held_out.loss(*solution))
        worse = 0 if loss < best else worse + 1
        if loss < best:
            best, chosen = loss, (penalty, solution)
        if worse == 2:
            break
    return chosen
