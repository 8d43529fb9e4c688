"""Upper bounds of what one request may ask for."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from visadapt.checks import check_count


@dataclass(frozen=True)
class Limits:
    """Upper bounds of requests; what is above is refused before memory is taken for it.

    Args:
        body: bytes of an HTTP request.
        image: bytes of one encoded image.
        pixels: width × height of one image.
        text: characters of one text, or of both texts of a pair.
        inputs: samples per request.
        top: labels per sample of the answer.
        queue: samples that wait at the same time; further requests are refused as overloaded.
        bodies: bytes of all HTTP requests that are received or answered at the same time; further ones are refused as
            overloaded.

    Examples:
        >>> from visadapt.serving import Limits
        >>> Limits(queue=64).queue
        64
    """

    body: int = 64 << 20
    image: int = 20 << 20
    pixels: int = 50_000_000
    text: int = 100_000
    inputs: int = 64
    top: int = 1000
    queue: int = 1024
    bodies: int = 512 << 20

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            check_count(getattr(self, field.name), field.name)
