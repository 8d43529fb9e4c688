"""Comparisons compute without TF32, and leave the process's settings as they were."""

from __future__ import annotations

import threading

import pytest
import torch

from visadapt.backbone.full_precision import full_precision

NEW = [
    place
    for place in (
        getattr(torch.backends.cudnn, "conv", None),
        getattr(torch.backends.cudnn, "rnn", None),
        torch.backends.cuda.matmul,
    )
    if hasattr(place, "fp32_precision")
]
"""Where torch keeps a precision for each kind of operator; nowhere before 2.9."""


def settings() -> list[object]:
    """All settings of float32 on a GPU; those that torch cannot tell are None."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    found: list[object] = [torch.get_float32_matmul_precision(), matmul.allow_tf32]
    found.extend(place.fp32_precision for place in NEW)
    try:
        found.append(cudnn.allow_tf32)
    except RuntimeError:
        found.append(None)
    return found


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_settings_are_changed_and_restored(gpu, precision) -> None:
    torch.set_float32_matmul_precision(precision)
    before = settings()
    with full_precision(), full_precision():
        assert settings() == ["highest", False, *["ieee"] * len(NEW), False]
    assert settings() == before


@pytest.mark.skipif(not NEW, reason="this torch has one setting for all operators")
def test_settings_of_single_operators_are_restored(gpu) -> None:
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    before = settings()
    with full_precision():
        assert settings()[2:5] == ["ieee", "ieee", "ieee"]
    assert settings() == before


def test_the_last_of_several_threads_restores(gpu) -> None:
    before = settings()
    first, second = threading.Event(), threading.Event()

    def other() -> None:
        with full_precision():
            first.set()
            second.wait(10)

    thread = threading.Thread(target=other)
    with full_precision():
        thread.start()
        first.wait(10)
    assert settings()[0:2] == ["highest", False]
    assert torch.backends.cudnn.allow_tf32 is False
    second.set()
    thread.join()
    assert settings() == before


def test_nothing_is_touched_without_a_gpu(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = settings()
    with full_precision():
        assert settings() == before
