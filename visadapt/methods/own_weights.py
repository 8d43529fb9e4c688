"""Tasks with their own copies of the backbone's weights: fine-tuning, with tasks that can still be switched."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from visadapt.backbone.facts import Facts
from visadapt.backbone.modules import inside, joined, own_parameters, within
from visadapt.backbone.site import Site
from visadapt.checks import check_count
from visadapt.errors import VisadaptError
from visadapt.methods.method import Method
from visadapt.methods.policy import Policy


@dataclass(frozen=True)
class Full(Method):
    """Full fine-tuning: the task's own copy of every weight (the upper bound of Houlsby et al. 2019, 1902.00751, §3).

    100 % of the backbone's parameters per task. The norms follow the policy: with ``norms="full"`` training is ordinary
    fine-tuning, with ``frozen`` they stay the backbone's. The head is the task's, or with ``head="frozen"`` the
    backbone's.

    Raises:
        VisadaptError: ``inject`` was given ``where=``.

    Examples:
        >>> images = torch.randn(2, 3, 32, 32)
        >>> model = visadapt.inject(backbone, visadapt.Full(), task="flowers", num_classes=3).eval()
        >>> plain = visadapt.merge(model, "flowers")
        >>> torch.allclose(plain(images), model(images), atol=1e-4)
        True
    """

    kinds: ClassVar[tuple[str, ...]] = ()

    def parts(self, backbone: Facts, sites: Sequence[Site], task: Policy) -> Iterable[tuple[str, nn.Module]]:
        self.no_sites(sites)
        return own_weights(backbone, task, "", lambda path, name: path not in backbone.norms)


@dataclass(frozen=True)
class Biases(Method):
    """BitFit: the task's own biases (Ben Zaken et al. 2022, arXiv 2106.10199, §3).

    One parameter per channel of every layer with a bias. Those of the norms are among them with ``norms="frozen"``,
    which is BitFit as published; otherwise the task has its own norms anyway.

    Raises:
        VisadaptError: ``inject`` was given ``where=``; the backbone has no bias.

    Examples:
        >>> model = visadapt.inject(backbone, visadapt.Biases(), task="flowers", num_classes=3, norms="frozen")
        >>> len(visadapt.parameters(model, "flowers")), visadapt.summary(model)["flowers"].methods
        (23, 'Biases()')
    """

    kinds: ClassVar[tuple[str, ...]] = ()

    def parts(self, backbone: Facts, sites: Sequence[Site], task: Policy) -> Iterable[tuple[str, nn.Module]]:
        self.no_sites(sites)
        norms = backbone.norms if task.norms != "frozen" else {}

        return own_weights(backbone, task, "", lambda path, name: name.endswith("bias") and path not in norms)


@dataclass(frozen=True)
class TopLayers(Method):
    """Variable fine-tuning: the task's own weights of the top n blocks (Houlsby et al. 2019, 1902.00751, §3.3).

    As many parameters as these blocks have. Their norms are the policy's, the head is the task's; what stands between
    the last block and the head (a pooler, say) stays the backbone's.

    Args:
        n: number of blocks, counted from the output.

    Raises:
        VisadaptError: ``n`` is not a positive integer, or there are fewer blocks.

    Examples:
        >>> images = torch.randn(2, 3, 32, 32)
        >>> model = visadapt.inject(backbone, visadapt.TopLayers(n=1), task="flowers", num_classes=3).eval()
        >>> plain = visadapt.merge(model, "flowers")
        >>> torch.allclose(plain(images), model(images), atol=1e-4)
        True
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
            if any(inside(path, other) for other in paths) or not own_parameters(backbone.modules[path]):
                continue
            yield from own_weights(backbone, task, path, lambda path, name: path not in backbone.norms)


class OwnWeights(nn.Module):
    """A task's own values of the parameters that one module owns.

    Args:
        values: by the parameters' names in that module.
        root: path of the module that the method names, of which this one is a part.
    """

    role: ClassVar[str] = "weights"
    replaces: ClassVar[bool] = True

    def __init__(self, values: dict[str, nn.Parameter], root: str) -> None:
        super().__init__()
        self.root = root
        # not by register_parameter, which refuses the names of this class's own attributes
        self._parameters.update(values)

    @property
    def names(self) -> tuple[str, ...]:
        """The host's parameters that it replaces."""
        return tuple(self._parameters)

    def forward(self, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        # a replica of DataParallel has its tensors as attributes
        own: dict[str, Any] = self._parameters or self.__dict__
        return {name: own[name] for name in parameters if name in own}


def own_weights(
    backbone: Facts, task: Policy, root: str, wanted: Callable[[str, str], bool]
) -> list[tuple[str, OwnWeights]]:
    """The task's own values of parameters, for each module that owns some of them.

    The head's are left out: they are the head policy's. Weights that are tied stay tied.

    Args:
        backbone: facts about it.
        task: whose own modules have their own weights already.
        root: path of the module in and below which the parameters are.
        wanted: whether a parameter is to be the task's, by its module's path and its name there.

    Returns:
        Path and part of each module.

    Raises:
        VisadaptError: a parameter does not exist, or is of a dtype that cannot be trained.
    """
    values: dict[nn.Parameter, nn.Parameter] = {}
    elsewhere = (*backbone.head_modules, *task.owned)
    parts = []
    inside = {path: module for path, module in backbone.modules.items() if not root or within(path, (root,))}
    # the head last: of it a task has only what is tied to a weight elsewhere
    for path in sorted(inside, key=lambda path: within(path, elsewhere)):
        if within(path, task.owned):
            continue
        own = {}
        for name, parameter in inside[path]._parameters.items():
            if parameter is None or not wanted(path, name):
                continue
            if within(path, elsewhere) and parameter not in values:
                continue
            if not (parameter.is_floating_point() or parameter.is_complex()):
                raise VisadaptError(f"{joined(path, name)} cannot be trained: it is kept in {parameter.dtype}")
            if parameter not in values:
                values[parameter] = nn.Parameter(_copied(parameter))
            own[name] = values[parameter]
        if own:
            parts.append((path, OwnWeights(own, root)))
    if not parts:
        raise VisadaptError(
            f"{root or backbone.name} has no such parameters beside its norms, which are the norm policy's, and its "
            "head"
        )
    return parts


def _copied(parameter: Tensor) -> Tensor:
    # on the meta device if that is the default, like all that is built there
    return parameter.detach().to("meta") if torch.get_default_device().type == "meta" else parameter.detach().clone()
