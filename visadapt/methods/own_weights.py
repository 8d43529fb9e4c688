"""Tasks with their own copies of the backbone's weights: what fine-tuning does, still switchable."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from visadapt.backbone.facts import Facts
from visadapt.backbone.modules import CHILD, within
from visadapt.backbone.site import Site
from visadapt.checks import check_count
from visadapt.errors import VisadaptError
from visadapt.methods.method import Method
from visadapt.methods.policy import Policy


@dataclass(frozen=True)
class Full(Method):
    """Full fine-tuning: the task's own copy of every weight (the upper bound of Houlsby et al. 2019, 1902.00751, §3).

    100 % of the backbone's parameters a task. The norms are the policy's: with ``norms="full"`` training is ordinary
    fine-tuning, with ``frozen`` they stay the backbone's. The head is the task's, or with ``head="frozen"`` the
    backbone's.

    Raises:
        VisadaptError: ``inject`` was given ``where=``.
    """

    kinds: ClassVar[tuple[str, ...]] = ()

    def parts(self, backbone: Facts, sites: Sequence[Site], task: Policy) -> Iterable[tuple[str, nn.Module]]:
        self.no_sites(sites)
        yield "", own_weights(backbone, task, "", lambda name: _module(name) not in backbone.norms)


@dataclass(frozen=True)
class Biases(Method):
    """BitFit: the task's own biases (Ben Zaken et al. 2022, arXiv 2106.10199, §3).

    One parameter a channel of every layer with a bias. Those of the norms are among them with ``norms="frozen"``,
    which is BitFit as published; otherwise the task has its own norms anyway.

    Raises:
        VisadaptError: ``inject`` was given ``where=``; the backbone has no bias.
    """

    kinds: ClassVar[tuple[str, ...]] = ()

    def parts(self, backbone: Facts, sites: Sequence[Site], task: Policy) -> Iterable[tuple[str, nn.Module]]:
        self.no_sites(sites)
        norms = backbone.norms if task.norms != "frozen" else {}

        def wanted(name: str) -> bool:
            return name.rpartition(".")[2].endswith("bias") and _module(name) not in norms

        yield "", own_weights(backbone, task, "", wanted)


@dataclass(frozen=True)
class TopLayers(Method):
    """Variable fine-tuning: the task's own weights of the top n blocks (Houlsby et al. 2019, 1902.00751, §3.3).

    As many parameters as these blocks have. Their norms are the policy's, the head is the task's; what stands between
    the last block and the head (a pooler, say) stays the backbone's.

    Args:
        n: number of blocks, counted from the output.

    Raises:
        VisadaptError: ``n`` is no positive int; there are fewer blocks.
    """

    kinds: ClassVar[tuple[str, ...]] = ("block", "attention", "mlp", "conv3x3")

    n: int = 1

    def __post_init__(self) -> None:
        check_count(self.n, "n")
        object.__setattr__(self, "where", slice(-self.n, None))

    def parts(self, backbone: Facts, sites: Sequence[Site], task: Policy) -> Iterable[tuple[str, nn.Module]]:
        depths = sorted({site.depth for site in sites})
        if len(depths) < self.n:
            raise VisadaptError(f"TopLayers(n={self.n}): there are {len(depths)} blocks where it is to stand")
        paths = dict.fromkeys(site.block for site in sites if site.depth in depths[-self.n :])
        for path in paths:
            # a block may be one activation (in VGG, behind the conv that is a block of its own), or lie in another
            if any(path.startswith(f"{other}.") for other in paths) or not any(_named(backbone.modules[path])):
                continue
            yield path, own_weights(backbone, task, path, lambda name: _module(name) not in backbone.norms)


class OwnWeights(nn.Module):
    """Copies of a host's parameters, in a tree of modules like the host's own, so that their names are the same."""

    role: ClassVar[str] = "weights"

    def __init__(self, copies: dict[str, nn.Parameter], names: dict[str, str]) -> None:
        super().__init__()
        self._names = names
        for name, parameter in copies.items():
            *path, last = name.split(".")
            node: nn.Module = self
            for step in path:
                if step not in node._modules:
                    node.add_module(step, nn.Module())
                node = node._modules[step]  # type: ignore[assignment]
            node.register_parameter(last, parameter)

    def forward(self, parameters: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
        own = dict(self.named_parameters())
        return {name: own[source] for name, source in self._names.items()}


def own_weights(backbone: Facts, task: Policy, path: str, wanted: Callable[[str], bool]) -> OwnWeights:
    """The task's own copies of the parameters below ``path``, but for the head's: these are the head policy's.

    Args:
        backbone: what is known of it.
        task: whose own modules have their own weights already.
        path: of the host.
        wanted: whether a parameter is to be copied, by its name in the model.

    Raises:
        VisadaptError: there is no such parameter.
    """
    first: dict[int, str] = {}
    copies: dict[str, nn.Parameter] = {}
    names: dict[str, str] = {}
    at = f"{path}." if path else ""
    elsewhere = (*backbone.head_modules, *task.owned)
    for name, parameter in _named(backbone.modules[path]):
        full = f"{at}{name}"
        if within(_module(full), elsewhere) or not wanted(full):
            continue
        # weights that are tied stay tied
        source = first.setdefault(id(parameter), name)
        names[name] = source
        if source == name:
            copies[name] = nn.Parameter(parameter.detach().clone())
    if not copies:
        what = path or backbone.name
        raise VisadaptError(
            f"{what} has no such parameters beside its norms, which are the norm policy's, and its head"
        )
    return OwnWeights(copies, names)


def _named(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if CHILD not in name.split("."):
            yield name, parameter


def _module(name: str) -> str:
    return name.rpartition(".")[0]
