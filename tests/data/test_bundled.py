"""The bundled files are what SHA256SUMS and the README say, and a wrong name gets a helpful refusal."""

import hashlib

import pytest

from visadapt.data import bundled
from visadapt.errors import VisadaptError

SUMS = dict(reversed(line.split("  ")) for line in (bundled.folder() / "SHA256SUMS").read_text().splitlines())


@pytest.mark.parametrize("name", SUMS)
def test_sha256(name: str) -> None:
    assert hashlib.sha256(bundled.path(name).read_bytes()).hexdigest() == SUMS[name]


def test_names_are_the_listed_files() -> None:
    assert set(bundled.names()) == set(SUMS)
    assert "resnet50_imagenet_int8.safetensors" in SUMS


def test_all_files_stay_under_fifty_megabytes() -> None:
    assert sum(bundled.path(name).stat().st_size for name in SUMS) < 50e6


def test_readme_table_is_up_to_date() -> None:
    readme = (bundled.folder() / "README.md").read_text()
    for name, digest in SUMS.items():
        assert f"| `{name}` | {bundled.path(name).stat().st_size:,} | `{digest}` |" in readme


def test_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(VisadaptError, match=r"no bundled file 'mnist\.web'.*'mnist\.webp'"):
        bundled.path("mnist.web")


def test_no_path_outside_the_folder() -> None:
    with pytest.raises(VisadaptError, match="no bundled file"):
        bundled.path("../pyproject.toml")


def test_missing_files_are_reported(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(bundled, "_FOLDERS", (tmp_path,))
    with pytest.raises(VisadaptError, match="not installed"):
        bundled.path("mnist.webp")


def test_wheel_layout_comes_first(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    (tmp_path / "SHA256SUMS").write_text("0" * 64 + "  a.webp\n")
    monkeypatch.setattr(bundled, "_FOLDERS", (tmp_path, *bundled._FOLDERS))
    assert bundled.path("a.webp") == tmp_path / "a.webp"
