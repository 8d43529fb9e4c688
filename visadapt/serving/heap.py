"""The memory that the C library keeps after it was freed."""

from __future__ import annotations

import ctypes
import gc


def trim_heap() -> bool:
    """Return memory that is free, but kept by the C library, to the system.

    Between blocks that are in use, glibc keeps freed pages for ever: after a warm-up of batches of many sizes, several
    hundred MB.

    Returns:
        Whether there is a way to do so; there is none without glibc.

    Examples:
        >>> from visadapt.serving.heap import trim_heap
        >>> trim_heap() in (True, False)
        True
    """
    gc.collect()
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # musl; macOS; Windows
        return False
    trim(0)
    return True
