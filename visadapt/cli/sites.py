"""``visadapt sites``."""

from __future__ import annotations

import visadapt
from visadapt.cli.options import Backbone, Build, Where, number, pairs
from visadapt.cli.output import show
from visadapt.opening.backbones import build_backbone


def sites(backbone: Backbone, where: Where = None, build: Build = None) -> None:
    """List the sites in a backbone where adapters can be placed."""
    terms = [number(term) for term in where or ()]
    show(visadapt.sites(build_backbone(backbone, pairs(build, "--build")), terms or None))
