"""The environment that a result was computed in: device, versions, commit."""

from __future__ import annotations

import platform
import subprocess
from functools import cache
from importlib import metadata
from pathlib import Path

import torch

_LIBRARIES = ("torch", "timm", "transformers")


def machine(device: torch.device | str | None = None) -> dict[str, str]:
    """Describe the environment that results are computed in.

    Args:
        device: device to compute on; None for the CPU.

    Returns:
        ``device``, ``python``, the versions of torch, timm and transformers where installed, and in a git checkout
        ``commit``, marked ``-dirty`` if files differ from it.
    """
    chosen = torch.device("cpu" if device is None else device)
    name = torch.cuda.get_device_name(chosen) if chosen.type == "cuda" else f"{chosen.type} {platform.machine()}"
    return {"device": name, "python": platform.python_version(), **_versions(), **_commit()}


def computes_in_bf16(device: torch.device | str) -> bool:
    """Whether a device has instructions for bfloat16: a CPU without them takes 10 times as long as in float32.

    Args:
        device: device to compute on.

    Returns:
        Whether it has them.
    """
    if torch.device(device).type != "cpu":
        return True
    found: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(found.get(name, False) for name in ("amx_bf16", "avx512_bf16"))


@cache
def _versions() -> dict[str, str]:
    installed = {d.metadata["Name"] for d in metadata.distributions()}
    return {name: metadata.version(name) for name in _LIBRARIES if name in installed}


@cache
def _commit() -> dict[str, str]:
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return {}
    command = ("git", "-C", str(root), "describe", "--always", "--dirty", "--exclude", "*")
    try:
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {"commit": output.strip()}
