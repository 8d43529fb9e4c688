"""The code of the page on long-running processes runs as it stands."""

import re
from pathlib import Path

PAGE = Path(__file__).parents[1] / "docs" / "long-running.md"


def test_the_code_of_the_page(capsys) -> None:
    space = {"__name__": "page"}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(block, PAGE.name, "exec"), space)
    assert capsys.readouterr().out.splitlines() == [
        "{'flowers': (2, 3), 'birds': (2, 3), None: (2, 4)}",
        "task 'birds' was removed while it was in use",
    ]
