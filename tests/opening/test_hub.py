"""Tasks shared by a hub on this machine: what is pushed is opened again, pinned, and only as data."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import visadapt
from tests.opening.hub_server import Hub, serving
from tests.opening.test_opening import LABELS, flowers, second
from visadapt import VisadaptError
from visadapt.opening.pushing import _check_words
from visadapt.runtime.registry import tasks
from visadapt.task_file import read

hub_library = pytest.importorskip("huggingface_hub")

# huggingface_hub's own, in its upload of large files
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.chdir(tmp_path)
    with serving() as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.address)
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
                            f"{hub.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}")  # fmt: skip
        monkeypatch.setenv("HF_TOKEN", "token-of-the-test")
        yield hub


def card(hub: Hub, name: str) -> str:
    return hub.repositories[name][-1][1]["README.md"].decode()


def test_what_was_pushed_is_opened(hub: Hub, capfd: pytest.CaptureFixture[str]) -> None:
    model, x = flowers(), torch.randn(3, 3, 32, 32)
    pinned = visadapt.push_to_hub(model, "flowers", "user/flowers", metrics={"accuracy": 0.9123})
    commit = hub.repositories["user/flowers"][-1][0]
    assert pinned == f"hub:user/flowers@{commit}"
    assert sorted(hub.repositories["user/flowers"][-1][1]) == ["README.md", "flowers.visadapt"]
    expected = visadapt.predict(model, x, "flowers")
    for source in ("user/flowers", "hub:user/flowers", pinned, f"hub:user/flowers/flowers.visadapt@{commit}"):
        capfd.readouterr()
        again = visadapt.open(source)
        assert visadapt.predict(again, x, "flowers") == expected
        origin = f"hub:user/flowers/flowers.visadapt@{commit}"
        assert tasks(again)["flowers"].origin == origin
        # the revision and the digest that were opened are shown
        digest = read(visadapt.save(again, "flowers", "again.visadapt")).digest
        assert f"{origin}: digest {digest}" in capfd.readouterr().err.splitlines()


@pytest.mark.parametrize("option", [{"license": "a\nb"}, {"license": ""}, {"revision": "a..b"}, {"revision": "-x"},
                                    {"revision": "a/"}, {"revision": ""}])  # fmt: skip
def test_what_is_not_a_license_or_a_branch_is_not_sent(hub: Hub, option: dict[str, Any]) -> None:
    with pytest.raises(VisadaptError, match=f"{next(iter(option))} must be"):
        visadapt.push_to_hub(flowers(), "flowers", "user/flowers", **option)
    assert hub.requests == []


def test_what_is_a_license_and_a_branch() -> None:
    for license, branch in (("apache-2.0", "main"), ("cc-by-nc-4.0", "refs/pr/1"), (None, "v1.2_x-y")):
        _check_words(license, branch)


def test_the_card_says_what_it_is(hub: Hub) -> None:
    model = flowers()
    visadapt.push_to_hub(model, "flowers", "user/flowers", metrics={"accuracy": 0.9123}, license="apache-2.0")
    text = card(hub, "user/flowers")
    size = sum(p.numel() for p in visadapt.parameters(model, "flowers"))
    for expected in (
        "library_name: visadapt",
        "license: apache-2.0",
        "pipeline_tag: image-classification",
        "- bottleneck",
        "| method | Bottleneck(m=2) |",
        "| backbone | timm/resnet18 |",
        "| loaded with | pretrained=False, channels=\\[8, 16, 24, 32\\] |",
        f"| size | {size:,} trained parameters, ",
        "| inputs | RGB images, 32 × 32 pixels |",
        "| labels | iris, lily, rose |",
        "| metrics | accuracy 0.9123 |",
        "model = visadapt.open('hub:user/flowers')",
        "visadapt.predict(model, ['photo.jpg'], 'flowers')",
    ):
        assert expected in text, expected
    loaded = hub_library.ModelCard(text)
    assert loaded.data.library_name == "visadapt"


def test_the_program_on_the_card_runs(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = pytest.importorskip("PIL.Image")
    image.new("RGB", (40, 40), "red").save(tmp_path / "photo.jpg")
    visadapt.push_to_hub(flowers(), "flowers", "user/flowers")
    program = card(hub, "user/flowers").partition("```python\n")[2].partition("```")[0]
    exec(compile(program, "card", "exec"), {})
    assert "Prediction(task='flowers', labels=('" in capsys.readouterr().out


def test_text_of_a_label_is_not_markdown(hub: Hub) -> None:
    labels = ("a|b", "[x](http://127.0.0.1/)", "<img src=x>\n---")
    visadapt.push_to_hub(flowers(labels=labels), "flowers", "user/flowers")
    text = card(hub, "user/flowers")
    assert r"a\|b, \[x\](http://127.0.0.1/), \<img src=x\> ---" in text
    assert text.count("\n---\n") == 1


def test_several_tasks_are_one_commit_and_one_backbone(hub: Hub) -> None:
    model = second(flowers())
    pinned = visadapt.push_to_hub(model, ["flowers", "birds"], "user/two")
    assert len(hub.repositories["user/two"]) == 1
    assert list(tasks(visadapt.open(pinned))) == ["birds", "flowers"]
    assert list(tasks(visadapt.open("hub:user/two/birds.visadapt"))) == ["birds"]
    assert "## flowers" in card(hub, "user/two")
    assert "## birds" in card(hub, "user/two")


def test_a_pinned_revision_stays(hub: Hub) -> None:
    x = torch.randn(2, 3, 32, 32)
    old = visadapt.push_to_hub(flowers(seed=1), "flowers", "user/flowers")
    new = visadapt.push_to_hub(flowers(seed=2), "flowers", "user/flowers", message="Trained again")
    first, again, latest = (visadapt.predict(visadapt.open(s), x, top=3) for s in (old, old, "hub:user/flowers"))
    assert first == again == visadapt.predict(flowers(seed=1), x, top=3)
    assert latest == visadapt.predict(visadapt.open(new), x, top=3) != first


def test_a_pinned_commit_in_the_cache_needs_no_network(hub: Hub) -> None:
    pinned = visadapt.push_to_hub(flowers(), "flowers", "user/flowers")
    visadapt.open(pinned)
    hub.requests.clear()
    visadapt.open(pinned)
    assert hub.requests == []


def test_only_task_files_at_the_top_are_downloaded(hub: Hub) -> None:
    pinned = visadapt.push_to_hub(flowers(), "flowers", "user/flowers")
    files = hub.repositories["user/flowers"][-1][1]
    hub.commit("user/flowers", {"evil.py": b"raise SystemExit", "deep/x.visadapt": b"x", "config.json": b"{}", **files})
    hub.requests.clear()
    visadapt.open("hub:user/flowers")
    read_files = {request.rpartition("/")[2] for request in hub.requests if "/resolve/" in request}
    assert read_files <= {"flowers.visadapt"}
    assert pinned


def test_a_downloaded_file_chooses_nothing(hub: Hub, tmp_path: Path) -> None:
    model = flowers()
    tasks(model)["flowers"].notes["backbone"] = {"name": "timm/resnet18", "build": {"checkpoint_path": "/etc/passwd"}}
    visadapt.push_to_hub(model, "flowers", "user/evil")
    assert "visadapt.open('hub:user/evil', backbone='timm/resnet18', build=" in card(hub, "user/evil")
    with pytest.raises(VisadaptError, match="must not choose checkpoint_path="):
        visadapt.open("hub:user/evil")
    hub.commit("user/evil", {"flowers.visadapt": b"\x80\x04K\x01."})
    with pytest.raises(VisadaptError, match="is not a whole task file"):
        visadapt.open("hub:user/evil")


def test_a_backbone_without_a_name_is_given_by_hand(hub: Hub) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    visadapt.inject(net, visadapt.LoRA(r=1), task="a", head="frozen", where="op")
    pinned = visadapt.push_to_hub(net, "a", "user/own")
    assert "visadapt.open('hub:user/own', backbone=network)" in card(hub, "user/own")
    with pytest.raises(VisadaptError, match="does not record its backbone"):
        visadapt.open(pinned)
    own = visadapt.eject(net)
    assert visadapt.open(pinned, backbone=own) is own


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("hub:nobody/nothing", "cannot download 'nobody/nothing' from the hub: "),
        ("nobody/nothing", "no file nobody/nothing, and cannot download 'nobody/nothing' from the hub: "),
        ("hub:user/empty", r"the repository user/empty has no task file \(\*.visadapt\) at revision [0-9a-f]{40}"),
        ("hub:user/empty/x.visadapt", "the repository user/empty has no x.visadapt at revision"),
        ("hub:user/empty@gone", "cannot download 'user/empty' from the hub: "),
        ("hub:../../etc/passwd", "a repository must be hub:user/repo"),
        ("hub:user/empty/deep/x.visadapt", "a repository must be hub:user/repo"),
        ("hub:user", "a repository must be hub:user/repo"),
        ("user/flowers.visadapt", "no file user/flowers.visadapt"),
    ],
)
def test_a_source_that_does_not_exist(hub: Hub, source: str, message: str) -> None:
    hub.commit("user/empty", {"README.md": b"# empty"})
    with pytest.raises(VisadaptError, match=message):
        visadapt.open(source)


def test_a_push_that_cannot_be_is_refused_before_anything_is_sent(hub: Hub) -> None:
    model = second(flowers())
    for wrong, message in {
        "repository must be 'user/repo', got 'flowers'": lambda: visadapt.push_to_hub(model, "flowers", "flowers"),
        "no task 'flower'; did you mean": lambda: visadapt.push_to_hub(model, "flower", "user/x"),
        "metrics must be finite numbers by name": lambda: visadapt.push_to_hub(
            model, "flowers", "user/x", metrics={"accuracy": float("nan")}
        ),
        "metrics= applies to a single task": lambda: visadapt.push_to_hub(
            model, ["flowers", "birds"], "user/x", metrics={"accuracy": 1.0}
        ),
        "at least one task": lambda: visadapt.push_to_hub(model, [], "user/x"),
    }.items():
        with pytest.raises(VisadaptError, match=wrong):
            message()
    assert hub.requests == []


def test_a_hub_that_does_not_answer(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(VisadaptError, match="cannot push to 'user/flowers': "):
        visadapt.push_to_hub(flowers(), "flowers", "user/flowers")
    with pytest.raises(VisadaptError, match="cannot download 'user/flowers' from the hub: "):
        visadapt.open("hub:user/flowers")


@pytest.mark.parametrize(
    ("refusal", "message"),
    [
        ((401, "RepoNotFound"), "401 .*not for everybody"),
        ((403, "GatedRepo"), "403 .*gated repo.*not for everybody"),
        ((404, "RepoNotFound"), "404 .*Repository Not Found"),
    ],
)
def test_a_private_or_gated_repository_is_one_clear_line(hub: Hub, refusal: tuple[int, str], message: str) -> None:
    hub.commit("user/flowers", {"flowers.visadapt": b"x"})
    hub.refuses = refusal
    with pytest.raises(VisadaptError, match=f"cannot download 'user/flowers' from the hub: .*{message}") as caught:
        visadapt.open("hub:user/flowers")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("storage", [False, True])
def test_files_are_downloaded_beside_xet_and_from_another_host(
    hub: Hub, storage: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    visadapt.push_to_hub(flowers(), "flowers", "user/flowers")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    hub.storage = storage
    assert list(tasks(visadapt.open("hub:user/flowers"))) == ["flowers"]
    assert any("/large/" in request for request in hub.requests if request.startswith("GET")) == storage


def test_xet_that_cannot_be_reached_is_one_clear_line(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    visadapt.push_to_hub(flowers(), "flowers", "user/flowers")
    hub.xet = True
    pytest.importorskip("hf_xet")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    with pytest.raises(VisadaptError, match=r"from the hub: 404 .*xet-read-token"):
        visadapt.open("hub:user/flowers")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    assert list(tasks(visadapt.open("hub:user/flowers"))) == ["flowers"]


def test_without_the_network_the_cache_is_read(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    visadapt.push_to_hub(flowers(), "flowers", "user/flowers")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(VisadaptError, match=r"cannot download 'user/flowers' from the hub: .*HF_HUB_OFFLINE"):
        visadapt.open("hub:user/flowers")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    visadapt.open("hub:user/flowers")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert list(tasks(visadapt.open("hub:user/flowers"))) == ["flowers"]
    assert hub.requests == []


def test_another_hub_is_named_by_the_environment(hub: Hub, tmp_path: Path) -> None:
    """As a user would: in a fresh process."""
    pinned = visadapt.push_to_hub(flowers(), "flowers", "user/flowers")
    program = f"import visadapt; print(list(visadapt.tasks(visadapt.open({pinned!r}))))"
    given = {"HF_ENDPOINT": hub.address, "HF_HUB_CACHE": str(tmp_path / "other"), "HF_HUB_DISABLE_XET": "1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ, **given})
    assert done.stdout == "['flowers']\n", done.stderr
    assert f"hub:user/flowers/flowers.visadapt@{pinned.rpartition('@')[2]}: digest " in done.stderr


def test_labels_are_those_of_the_file(hub: Hub) -> None:
    visadapt.push_to_hub(flowers(), "flowers", "user/flowers", card=False)
    assert list(hub.repositories["user/flowers"][-1][1]) == ["flowers.visadapt"]
    assert tasks(visadapt.open("user/flowers"))["flowers"].labels == LABELS


def test_the_command_line_pushes_and_takes_repositories(hub: Hub, tmp_path: Path) -> None:
    testing = pytest.importorskip("typer.testing")
    from visadapt.cli.app import app

    image = pytest.importorskip("PIL.Image")
    image.new("RGB", (40, 40), "red").save(tmp_path / "photo.jpg")
    visadapt.save(second(flowers()), "birds", tmp_path / "birds.visadapt")

    def run(*words: str, code: int = 0) -> Any:
        result = testing.CliRunner().invoke(app, list(words))
        assert result.exit_code == code, result.output
        return result

    pushed = run("push", "birds.visadapt", "user/birds", "--metric", "accuracy=0.5").stdout.strip()
    assert pushed == f"hub:user/birds@{hub.repositories['user/birds'][-1][0]}"
    assert "| metrics | accuracy 0.5000 |" in card(hub, "user/birds")
    assert '"task": "birds"' in run("predict", "photo.jpg", "--task", pushed).stdout
    assert "birds.visadapt" in run("summary", pushed).stdout
    run("export", "hub:user/birds", "--out", "birds.pt2")
    refused = run("push", "birds.visadapt", "user/b", "--metric", "accuracy=high", code=1).stderr
    assert "metrics['accuracy'] must be a number, got 'high'" in refused
    visadapt.push_to_hub(second(flowers()), ["flowers", "birds"], "user/two")
    refused = run("merge", "hub:user/two", "--out", "two.safetensors", code=1).stderr
    assert "hub:user/two has several tasks (birds, flowers): name a file, as hub:USER/REPO/FILE.visadapt" in refused
