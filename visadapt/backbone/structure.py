"""The lock of those who change which modules a model has, or need them to stand still."""

from __future__ import annotations

import threading

STRUCTURE = threading.RLock()
"""Held by whoever injects, loads or removes a task, and by whoever copies a model or lists a task's parts.

A forward never waits for it: the dicts that a forward reads are replaced, not changed.
"""
