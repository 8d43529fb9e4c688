"""Problems by the names of a backbone and a data set."""

from __future__ import annotations

from typing import Any

from visadapt.arguments import takes
from visadapt.errors import VisadaptError, nearest
from visadapt.experiments.images import ImageProblem
from visadapt.experiments.problems import Problem
from visadapt.experiments.texts import TextProblem


@takes()
def problem(network: str, data: str, **options: Any) -> Problem:
    """Build the problem of adapting a backbone to a data set.

    Args:
        network: a backbone for texts, ``"bundled/minilm"`` or ``"hf/…"``, or one for images: ``"bundled/resnet50"``,
            ``"timm/…"``, ``"torchvision/…"``, or a ``.safetensors`` file of VGG-16's convolutions.
        data: name or path of the data set, as `visadapt.data.load_images` or `visadapt.data.load_text`
            takes it; also a zip file of a folder of images.
        **options: fields of `visadapt.experiments.images.ImageProblem` or
            `visadapt.experiments.texts.TextProblem`; those that are None keep their defaults.

    Returns:
        A `visadapt.experiments.texts.TextProblem` or `visadapt.experiments.images.ImageProblem`.
        Nothing is loaded yet.

    Raises:
        VisadaptError: an option does not exist.

    Examples:
        >>> from visadapt.experiments import problem
        >>> problem("bundled/resnet50", "digits", train=500, size=32).modality
        'image'
        >>> problem("bundled/minilm", "tweets").modality
        'text'
    """
    kind = TextProblem if network == "bundled/minilm" or network.startswith("hf/") else ImageProblem
    known = kind.__dataclass_fields__
    given = {name: value for name, value in options.items() if value is not None}
    for name in given:
        if name not in known:
            raise VisadaptError(f"{kind.__name__} has no option {name!r}{nearest(name, known)}")
    return kind(network, data, **given)
