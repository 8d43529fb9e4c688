"""Plain English in the package, the pages and the help texts: no phrases that read as if translated."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

PLACES = (
    "*.md",
    "data/*.md",
    "data/build/*.py",
    "docs/*.md",
    "docs/build/*.py",
    "visadapt/**/*.py",
    "examples/*.py",
    "benchmarks/*.py",
)

# CONTRIBUTING.md quotes what is not to be written
FILES = sorted(path for place in PLACES for path in ROOT.glob(place) if path.name != "CONTRIBUTING.md")

COUNTED = (
    r"one(?: \w*[a-rt-z])?|once|twice|times|sample|row|line|file|step|parameter|input|token|image|text|task|class|batch"
    "|epoch|tensor|value|number|byte|second|point|thread|column|entry|bar|panel|seed|run|weight|scale"
    "|page|adapter|folder|report"
)
UNITS = (
    "sample|step|task|site|batch|epoch|process|layer|channel|output channel|class|method|file|run|row|forward|backbone"
)

PHRASES = {
    # "one task a sample", "samples a step", "2dm parameters a site", "a row a method"
    rf"\b(?:{COUNTED})(?:es|s)? an? (?:{UNITS}|problem|token|text|image|seed|core|machine|line|host)\b": "per …",
    # "is no task file"; but "there is no …", "is no longer", "is no slower than"
    r"(?<!there )(?<!There )\b(?:is|are|was|were) no (?!longer\b|more\b|less\b|other\b|\w+er than\b)\w+": "is not a …",
    # but HTML's <picture>
    r"(?<![</])\bpictures?\b": "image",
    # "a training that was stopped"; but "a training run", "a training batch"
    r"\b(?:a|one|another|each|every|whole|same) training"
    r"(?=[.,;:)'\"`]| (?:that|which|is|was|of|on|with|in|to|and|or|goes|has|needs|when|whose|by|for|from|at|until"
    r"|without|does|can|could|would|may|asks|under|not|took|takes)\b)": "training run",
    r"\btrainings\b": "training runs",
    r"\bnobody\b": "say what is or is not done",
    r"\b(?:is|are|was|were|be|been) told\b": "say what is passed, given or set",
    r"\bgo(?:es|ing)? on (?:where|from where)\b": "resumes",
    r"\bis an? (?:positive|probability)\b": "must be …",
    r"\bwhere (?:the caller says|nothing is said|it says) (?:nothing|so)?": "by default",
}


def prose(path: Path) -> str:
    """Read a file; in Python code, drop the marks that interrupt wrapped comments and strings, but no line."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        text = re.sub(r"\n[ \t]*#", "\n ", text)
        text = re.sub(r"\"[ \t]*\n[ \t]*[rfb]*\"", " \n ", text)
    return text


def offences(text: str) -> Iterator[tuple[int, str, str]]:
    """Line number, phrase and replacement of each banned phrase; a phrase may be wrapped over lines."""
    words = [(word, number) for number, line in enumerate(text.splitlines(), 1) for word in line.split()]
    flat = " ".join(word for word, _ in words)
    for pattern, instead in PHRASES.items():
        for match in re.finditer(pattern, flat):
            yield words[flat.count(" ", 0, match.start())][1], match.group(), instead


def test_plain_english() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line}: {words!r} → {instead!r}"
        for path in FILES
        for line, words, instead in offences(prose(path))
    ]
    if found:
        pytest.fail("\n".join(found), pytrace=False)


@pytest.mark.parametrize(
    "text",
    [
        "one task a sample",
        "samples a\nstep",
        "an error: flowers is no task file",
        "these pictures",
        "a training that was stopped",
        "one of many trainings",
        "epochs is a positive int, got 0",
    ],
)
def test_a_banned_phrase_is_found(text: str) -> None:
    assert [line for line, _, _ in offences(text)] == [1]


@pytest.mark.parametrize(
    "text",
    [
        "one task per sample",
        "there is no task 'a'",
        "there\n    is no task",
        "it is no longer there",
        "a training run",
        "a task a user named",
    ],
)
def test_plain_english_is_not_flagged(text: str) -> None:
    assert list(offences(text)) == []


def message(node: ast.expr) -> str:
    """The text of an error's message, what is filled in left out."""
    if isinstance(node, ast.BinOp):
        return message(node.left) + message(node.right)
    if isinstance(node, ast.JoinedStr):
        return "".join(map(message, node.values))
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else "…"


def test_errors_that_say_what_they_got_say_what_must_be() -> None:
    errors = [
        (path, node.lineno, message(node.exc.args[0]))
        for path in FILES
        if path.suffix == ".py"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Raise)
        and isinstance(node.exc, ast.Call)
        and getattr(node.exc.func, "id", "") == "VisadaptError"
        and node.exc.args
    ]
    assert len(errors) > 400
    odd = [(str(path.relative_to(ROOT)), line, text) for path, line, text in errors if " got " in text]
    odd = [each for each in odd if " must " not in each[2]]
    assert not odd, "the form is 'X must be Y, got Z'"
