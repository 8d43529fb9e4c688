"""Processes that were forked: torch cannot compute gradients in some of them."""

from __future__ import annotations

import torch

from visadapt.errors import VisadaptError


def check_backward(caller: str) -> None:
    """Refuse to begin what needs gradients where torch computes none: as in some forks of a process that computed some.

    Args:
        caller: name of the function, for the message.

    Raises:
        VisadaptError: torch computes no gradients in this process.
    """
    with torch.inference_mode(False), torch.enable_grad():
        one = torch.ones((), device="cpu", requires_grad=True)
        try:
            (one * one).backward()  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            # torch has no function that tells
            raise VisadaptError(
                f"{caller}() needs gradients, and torch computes none in this process, which was forked after its "
                "parent computed some: start the process with multiprocessing's 'spawn' or 'forkserver', or fork first"
            ) from error
