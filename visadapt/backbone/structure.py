"""The lock for changing, copying or listing the modules of a model."""

from __future__ import annotations

import threading

STRUCTURE = threading.RLock()
"""Held while a task is injected, loaded or removed, and while a model is copied or a task's parts are listed.

A forward never waits for it: the dicts that a forward reads are replaced, not changed.
"""
