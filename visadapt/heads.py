"""Heads: the modules at a backbone's end that belong to a problem, found by structure, copied or made anew per task."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import nn

from visadapt.errors import VisadaptError
from visadapt.host import CHILD, LEAN, unfreeze, widened_class
from visadapt.sites import own_modules, own_parameters


@dataclass(frozen=True)
class Head:
    """Where a backbone's head is.

    Attributes:
        modules: paths of the modules that are the head, each replaced as a whole by the task's own.
        final: path of the linear (or 1×1 conv) that gives the logits; inside the last of ``modules`` or equal to it.
        fresh: whether the library makes such heads for the problem at hand, so that a task trains them anyway.
        others: paths of further finals whose logits are joined with those of the first: a distilled model's second
            head, one head for each of a model's stages.
    """

    modules: tuple[str, ...]
    final: str
    fresh: bool = False
    others: tuple[str, ...] = ()

    @property
    def finals(self) -> tuple[str, ...]:
        """All layers that give logits."""
        return (self.final, *self.others)


_NAMES = ("fc", "classifier", "head", "heads", "head_dist", "last_linear", "logits", "score", "pre_classifier")


def find_head(model: nn.Module) -> Head | None:
    """The head of a torchvision, timm or transformers model, or of anything that names it as they do; else None."""
    modules = own_modules(model)
    if hasattr(model, "config") and hasattr(model, "base_model_prefix"):
        return _transformers(model, modules)
    finals = _timm(model, modules)
    if finals:
        return Head(finals, finals[0], others=finals[1:])
    for name in _NAMES:
        within = [path for path, m in modules.items() if (path == name or path.startswith(f"{name}.")) and _is_final(m)]
        if within:
            return Head((within[-1],), within[-1])
    return None


def _timm(model: nn.Module, modules: dict[str, nn.Module]) -> tuple[str, ...]:
    """What timm's model says its classifiers are: by name in its config, or as modules."""
    named = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    finals = (named,) if isinstance(named, str) else tuple(named)
    if not finals and hasattr(model, "get_classifier"):
        given = model.get_classifier()  # type: ignore[operator]
        own = list(given) if isinstance(given, tuple | list | nn.ModuleList) else [given]
        finals = tuple(path for path, module in modules.items() if any(module is m for m in own))
    # a model made without a head says the same names, of nothing or of an identity
    return finals if finals and all(_is_final(modules.get(path)) for path in finals) else ()


def _transformers(model: nn.Module, modules: dict[str, nn.Module]) -> Head | None:
    base = str(model.base_model_prefix)
    # the model itself may host a task's parts (its own copy of all weights, say): these are no head
    children = {name: m for name, m in model._modules.items() if m is not None and name not in (base, CHILD)}
    owned = [name for name, module in children.items() if any(True for _ in module.parameters())]
    finals = [path for path, m in modules.items() if path.split(".")[0] in owned and _is_final(m)]
    if not finals or "LMHead" in type(model).__name__ or "MaskedLM" in type(model).__name__:
        return None
    return Head(tuple(owned), finals[-1], fresh=True)


def _is_final(module: nn.Module | None) -> bool:
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1))


def width_of(final: nn.Module) -> int:
    """Number of logits that a final layer gives."""
    return int(final.out_features if isinstance(final, nn.Linear) else final.out_channels)  # type: ignore[arg-type]


def build_head(model: nn.Module, head: Head, num_classes: int | None, dtype: torch.dtype) -> dict[str, nn.Module]:
    """A task's own head, on the backbone's device.

    Args:
        model: the backbone.
        head: where its head is.
        num_classes: width of a new final layer, or None to start from the backbone's weights.
        dtype: of the head's parameters.

    Returns:
        The task's module for each of ``head.modules``.
    """
    made: dict[str, nn.Module] = {}
    for path in head.modules:
        own = model.get_submodule(path)
        low = any(p.dtype in (torch.float16, torch.bfloat16) for p in own_parameters(own))
        # a head of a thousand classes is not copied only to be replaced by one of ten
        renewed = num_classes is not None and path in head.finals
        module = _renewed(own, cast("int", num_classes), model, dtype) if renewed else plain_copy(own).to(dtype)
        module.requires_grad_(True)
        for last in head.finals if num_classes is not None else ():
            if last.startswith(f"{path}."):
                inner = last.removeprefix(f"{path}.")
                final = module.get_submodule(inner)
                module.set_submodule(inner, _renewed(final, cast("int", num_classes), model, dtype))
        if low and dtype == torch.float32:
            module.__class__ = widened_class(type(module))
        made[path] = module
    return made


def plain_copy(module: nn.Module) -> nn.Module:
    """A copy of a backbone's module without any trace of tasks."""
    # a memo that already knows what is visadapt's makes deepcopy pass it by
    memo: dict[int, None] = {}
    for inner in own_modules(module).values():
        ours = (inner._modules.get(CHILD), inner.__dict__.get(LEAN), inner.__dict__.get("_visadapt"))
        memo |= {id(each): None for each in ours if each is not None}
    copied = copy.deepcopy(module, memo)
    for inner in copied.modules():
        inner._modules.pop(CHILD, None)
        unfreeze(inner)
    return copied


def _renewed(final: nn.Module, num_classes: int, model: nn.Module, dtype: torch.dtype) -> nn.Module:
    weight = final.weight
    assert isinstance(weight, nn.Parameter)
    fresh: nn.Module
    if isinstance(final, nn.Linear):
        fresh = nn.Linear(final.in_features, num_classes, final.bias is not None, device=weight.device, dtype=dtype)
    else:
        assert isinstance(final, nn.Conv2d)
        fresh = nn.Conv2d(
            final.in_channels, num_classes, 1, bias=final.bias is not None, device=weight.device, dtype=dtype
        )
    # transformers draws its heads at the scale of its config; torch's own default is as good elsewhere
    std = getattr(getattr(model, "config", None), "initializer_range", None)
    if isinstance(std, float) and math.isfinite(std):
        nn.init.normal_(fresh.weight, std=std)  # type: ignore[arg-type]
        if fresh.bias is not None:
            nn.init.zeros_(fresh.bias)  # type: ignore[arg-type]
    return fresh


def check_num_classes(num_classes: object) -> None:
    """Refuses anything but a positive int or None."""
    if num_classes is not None and (
        isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1
    ):
        raise VisadaptError(f"num_classes is a positive int, got {num_classes!r}")
