"""``visadapt sites``."""

from __future__ import annotations

import visadapt
from visadapt.cli.models import shaped
from visadapt.cli.options import Backbone, Build, Where, number, pairs
from visadapt.cli.output import show


def sites(backbone: Backbone, where: Where = None, build: Build = None) -> None:
    """Lists the places in a backbone where adapters can stand."""
    terms = [number(term) for term in where or ()]
    show(visadapt.sites(shaped(backbone, pairs(build, "--build")), terms or None))
