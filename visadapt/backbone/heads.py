"""Heads: the modules at a backbone's end that belong to a problem, found by structure, copied or made anew per task."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from visadapt.backbone.modules import CHILD, own_modules
from visadapt.backbone.operators import CONVS


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


def find_head(model: nn.Module, modules: dict[str, nn.Module] | None = None) -> Head | None:
    """The head of a torchvision, timm or transformers model, or of anything that names it as they do; else None.

    Args:
        model: the backbone.
        modules: its modules by path, where they are known.
    """
    modules = own_modules(model) if modules is None else modules
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
    return isinstance(module, nn.Linear) or (isinstance(module, CONVS) and set(module.kernel_size) == {1})


def width_of(final: nn.Module) -> int:
    """Number of logits that a final layer gives."""
    return int(final.out_features if isinstance(final, nn.Linear) else final.out_channels)  # type: ignore[arg-type]
