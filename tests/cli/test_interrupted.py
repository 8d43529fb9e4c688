"""Ctrl-C while the commands are imported ends the process with exit code 130 and no traceback."""

from __future__ import annotations

import pytest

from visadapt import cli


def test_ctrl_c_while_commands_are_imported_is_130(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("typer")

    def interrupted(name: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "import_module", interrupted)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 130
