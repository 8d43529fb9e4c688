"""Fixtures: each member of the zoo is built once, lent to its tests in turn, and looked over when it comes back."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch import nn

import visadapt
from tests.models import ZOO, Inputs, Member, anatomy, same, snapshot

settings.register_profile(
    "visadapt",
    deadline=None,
    max_examples=25,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("visadapt")

if "PYTEST_XDIST_WORKER" in os.environ:
    # one worker a core: threads of their own would fight over the same cores, in the processes they start as well
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # a fixture's parameter carries no mark where a test names the members itself
    for item in items:
        name = getattr(item, "callspec", None) and item.callspec.params.get("member")
        if name in ZOO and ZOO[name].slow:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session", params=list(ZOO))
def member(request: pytest.FixtureRequest) -> Member:
    return ZOO[request.param]


@lru_cache(maxsize=4)
def made(name: str) -> dict[str, Any]:
    """A member with what it was like; the last few are kept, as pytest comes back to a member between the others."""
    model = ZOO[name].make()
    return {"model": model, "state": snapshot(model), "anatomy": anatomy(model)}


@pytest.fixture(scope="session")
def lent(member: Member) -> dict[str, Any]:
    return made(member.name)


@pytest.fixture
def model(lent: dict[str, Any]) -> Iterator[nn.Module]:
    """A plain backbone in eval mode. Whatever a test does to it, ejected it must be what it was, bit for bit."""
    model = lent["model"]
    yield model
    if "_visadapt" in model.__dict__:
        visadapt.eject(model)
    model.eval()
    try:
        assert same(model.state_dict(), lent["state"]), "a test left other tensors in the backbone"
        assert anatomy(model) == lent["anatomy"], "a test left another backbone"
    except AssertionError:
        made.cache_clear()
        raise


@pytest.fixture
def inputs(member: Member) -> Inputs:
    return member.inputs()


@pytest.fixture
def tiny() -> nn.Module:
    """A fresh narrow ResNet, for what does not depend on the architecture."""
    return ZOO["tiny/resnet"].make()


@pytest.fixture
def image() -> torch.Tensor:
    return ZOO["tiny/resnet"].inputs()["x"]


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The device that tests of the core run on: ``VISADAPT_TEST_DEVICE``, by default the CPU."""
    return torch.device(os.environ.get("VISADAPT_TEST_DEVICE", "cpu"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The start of a command that runs a headless browser with a profile of its own."""
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
    if path is None:
        pytest.skip("no Chromium or Chrome on this machine to open the page in")
    profile = tmp_path_factory.mktemp("profile")
    return [path, "--headless=new", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
            "--hide-scrollbars", f"--user-data-dir={profile}"]  # fmt: skip
