"""The lock for changing, copying or listing the modules of a model."""

from __future__ import annotations

import os
import threading

STRUCTURE = threading.RLock()
"""Held while a task is injected, loaded or removed, and while a model is copied or a task's parts are listed.

A forward never waits for it: the dicts that a forward reads are replaced, not changed.
"""

if hasattr(os, "register_at_fork"):
    # a thread that holds it in the middle of a change is not in the new process, which would wait for it for ever
    os.register_at_fork(before=STRUCTURE.acquire, after_in_parent=STRUCTURE.release, after_in_child=STRUCTURE.release)
