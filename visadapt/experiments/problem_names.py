"""Problems by the names of a backbone and of a data set."""

from __future__ import annotations

from typing import Any

from visadapt.errors import VisadaptError, nearest
from visadapt.experiments.images import ImageProblem
from visadapt.experiments.problems import Problem
from visadapt.experiments.texts import TextProblem


def problem(network: str, data: str, **options: Any) -> Problem:
    """The problem of adapting a backbone to a data set.

    Args:
        network: of text if it is ``"bundled/minilm"`` or ``"hf/…"``, else of images: ``"bundled/resnet50"``,
            ``"timm/…"``, ``"torchvision/…"``, or a ``.safetensors`` file of VGG-16's convolutions.
        data: name or path of the data set, as :func:`visadapt.data.load_images` or :func:`visadapt.data.load_text`
            takes it; a zip file of a folder of images.
        **options: fields of :class:`~visadapt.experiments.images.ImageProblem` or
            :class:`~visadapt.experiments.texts.TextProblem`; those that are None keep their defaults.

    Raises:
        VisadaptError: there is no such option.
    """
    kind = TextProblem if network == "bundled/minilm" or network.startswith("hf/") else ImageProblem
    known = kind.__dataclass_fields__
    given = {name: value for name, value in options.items() if value is not None}
    for name in given:
        if name not in known:
            raise VisadaptError(f"{kind.__name__} has no option {name!r}{nearest(name, known)}")
    return kind(network, data, **given)
