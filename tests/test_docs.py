"""Generated pages say what the code says; the code on the others is run as a reader would, in an empty folder."""

import csv
import importlib.util
import os
import re
import shlex
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from benchmarks import pages
from benchmarks.figures import RESULTS, missed, read, with_goals
from benchmarks.goals import GOALS
from tests.opening.test_hub import hub  # noqa: F401
from tests.report import fake_results
from visadapt import METHODS, VisadaptError
from visadapt.data import load_images
from visadapt.experiments import write_csv
from visadapt.report import Report
from visadapt.report.claims import STATEMENTS
from visadapt.report.markdown_page import markdown

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize("name", ["methods", "performance"])
def test_a_page_is_current(name) -> None:
    spec = importlib.util.spec_from_file_location(f"{name}_page", DOCS / "build" / f"{name}.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert (DOCS / f"{name}.md").read_text() == script.page(), f"run python docs/build/{name}.py"


def test_every_goal_was_measured_and_every_miss_has_its_reason() -> None:
    files = sorted(RESULTS.glob("performance-*.csv"))
    assert files
    for file in files:
        measured = with_goals(read(file))
        assert {goal for goal, _ in measured} == set(GOALS)
        assert [goal.figure for goal, row in measured if missed(goal, row) and not goal.why] == []


@pytest.fixture(scope="module")
def evidence() -> list[pages.Evidence]:
    return pages.published()


def test_the_pages_of_results_are_current(evidence) -> None:
    assert {each.page for each in evidence} == {path.stem for path in DOCS.glob("results*.md")}
    for each in evidence:
        said = markdown(each.report, each.page)
        assert (DOCS / f"{each.page}.md").read_text(encoding="utf-8") == said, "run python -m benchmarks.pages"
        drawings = {drawing.name for section in each.report.sections for drawing in section.drawings}
        assert {path.stem for path in (DOCS / each.page).glob("*.svg")} == drawings


@pytest.mark.parametrize("page", pages.PAGES, ids=lambda page: page.stem)
def test_the_tables_of_a_page_are_current(page, evidence) -> None:
    said = page.read_text(encoding="utf-8")
    assert said == pages.filled(said, pages.blocks(evidence)), "run python -m benchmarks.pages"


def test_what_stands_between_the_comments_is_replaced() -> None:
    page = "# Title\n<!-- a 1 -->\nold\n\nlines\n<!-- /a 1 -->\ntext\n<!-- b -->\n<!-- /b -->\n"
    once = pages.filled(page, {"a 1": "new", "b": "table"})
    assert once == (
        "# Title\n<!-- a 1 -->\n\nnew\n\n<!-- /a 1 -->\ntext\n<!-- b -->\n\ntable\n\n<!-- /b -->\n"
    )  # fmt: skip
    assert pages.filled(once, {"a 1": "new", "b": "table"}) == once


def test_a_claim_also_has_the_results_of_earlier_runs() -> None:
    def tested(statement, modality, training_runs):
        return statement.tested(modality, None, f"{training_runs} measured", training_runs, modality)

    both, images = STATEMENTS[0], STATEMENTS[1]
    report = Report("t", None, (), (), claims=(tested(both, "text", 4), tested(both, "image", 0)))
    before = [tested(both, "text", 7), tested(both, "image", 9), tested(images, "image", 5)]
    assert pages.finding(both, report, before).splitlines()[2:] == [
        "* text: **cannot be decided** (4 training runs): 4 measured.",
        "* text, in earlier runs with small training sets: **cannot be decided** (7 training runs): 7 measured.",
        "* image, in earlier runs with small training sets: **cannot be decided** (9 training runs): 9 measured.",
    ]
    assert pages.finding(both, report, ()).endswith("(0 training runs): 0 measured.")


def test_what_new_evidence_does_not_test_is_shown_from_the_earlier_one(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(pages, "RESULTS", tmp_path)
    new = list(fake_results.compare())
    vgg16 = [replace(r, network="vgg16", key=f"{r.key}-vgg16") for r in new if r.network == "resnet50"]
    write_csv([*new, *vgg16, *fake_results.transfer()], tmp_path / "evidence.csv")
    write_csv([r for r in new if r.modality == "text"], tmp_path / "evidence-cpu.csv")
    assert [each.page for each in pages.published()] == ["results-earlier"], "texts only do not decide"
    write_csv(new, tmp_path / "evidence-cpu.csv")
    published = pages.published()
    assert [each.page for each in published] == ["results", "results-earlier"]
    parts = pages.blocks(published)
    earlier = [line for line in parts["advice"].splitlines() if line.endswith(f", {pages.EARLIER}.")]
    assert [line.split(",")[0] for line in earlier] == ["* On vgg16"]
    assert len(parts["advice"].splitlines()) == 3
    assert "(results/compare-minilm.svg)" in parts["figures"]
    assert "vgg16" not in parts["figures"]
    assert "(results-earlier/transfer.svg)" in parts["figures"]
    assert "### vgg16" in parts["earlier methods"]
    assert "### vgg16" not in parts["methods"]


def test_the_table_of_the_readme_fits_a_screen(evidence) -> None:
    assert 1 <= len(pages.summary(evidence[0].results).rows) <= pages.MOST


BLOCK = re.compile(r"```(python|sh|text)\n(.*?)```", re.DOTALL)

OF_ITS_OWN = "serving.md"
"""A page whose commands run beside each other; tests/serving/test_quickstart.py runs it."""

PAGES = sorted(
    path.name
    for path in DOCS.glob("*.md")
    if path.name != OF_ITS_OWN and re.search(r"```(?:python|sh)\n", path.read_text("utf-8"))
)

ENTRY = [sys.executable, "-c", "from visadapt.cli import main; main()"]


def run_page(page: str) -> None:
    """Run the blocks of a page in order; ``text`` with a VisadaptError is what the block before it raises."""
    space: dict[str, object] = {"__name__": "page"}
    blocks = BLOCK.findall((DOCS / page).read_text(encoding="utf-8"))
    following = [*(code if language == "text" else "" for language, code in blocks[1:]), ""]
    for (language, code), after in zip(blocks, following, strict=True):
        if language == "sh":
            subprocess.run(["bash", "-euo", "pipefail", "-c", code], check=True, env=shell())
        elif language == "python" and after.startswith("VisadaptError: "):
            with pytest.raises(VisadaptError) as error:
                exec(compile(code, page, "exec"), space)
            said, expected = (" ".join(text.split()) for text in (f"VisadaptError: {error.value}", after))
            assert said == expected
        elif language == "python":
            exec(compile(code, page, "exec"), space)


def shell() -> dict[str, str]:
    """Return the environment of a page's commands: this checkout's ``visadapt`` first on the path, and no download."""
    folder = Path("bin").absolute()
    folder.mkdir(exist_ok=True)
    (folder / "visadapt").write_text("#!/bin/sh\n" + shlex.join(ENTRY) + ' "$@"\n')
    (folder / "visadapt").chmod(0o755)
    path = os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "PYTHONPATH": str(DOCS.parent), "HF_HUB_OFFLINE": "1"}


@pytest.mark.slow
# huggingface_hub's own, in its upload of large files
@pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")
@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page(page, tmp_path, monkeypatch, request) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "page", types.ModuleType("page"))
    if "push_to_hub" in (DOCS / page).read_text(encoding="utf-8"):
        request.getfixturevalue("hub")
    own_photos(tmp_path / "photos")
    own_texts(tmp_path / "reviews.csv")
    known = dict(METHODS)
    try:
        run_page(page)
    finally:
        METHODS.clear()
        METHODS.update(known)


def own_photos(folder: Path) -> None:
    """Write a flat folder of classes as a camera and a browser leave it: EXIF, several modes, one damaged file."""
    images = load_images("cifar10")
    for label, name in ((3, "cats"), (5, "dogs"), (8, "ships")):
        (folder / name).mkdir(parents=True)
        rows = (images.train.labels == label).nonzero().flatten()[:8].tolist()
        for number, row in enumerate(rows):
            image = Image.fromarray(images.train.images[row].permute(1, 2, 0).numpy())
            if number % 5 == 1:
                exif = Image.Exif()
                exif[0x0112] = 6  # lies on its side
                image.rotate(90, expand=True).save(folder / name / f"{number}.jpg", exif=exif, quality=95)
            elif number % 5 == 2:
                image.convert("L").save(folder / name / f"{number}.png")
            elif number % 5 == 3:
                image.convert("RGBA").save(folder / name / f"{number}.webp")
            else:
                image.save(folder / name / f"{number}.JPG", format="JPEG", quality=95)
    (folder / "dogs" / "damaged.jpg").write_bytes(b"\xff\xd8\xff\xe0" + bytes(40))
    (folder / ".DS_Store").write_bytes(bytes(8))


def own_texts(file: Path) -> None:
    """Write a table of texts as a spreadsheet exports it: a mark, quotation marks, and line ends of Windows."""
    kinds = {"good": "works as it should, and is quiet", "bad": 'broke after a week, "sorry"'}
    with file.open("w", encoding="utf-8-sig", newline="") as table:
        writer = csv.writer(table)
        writer.writerow(("id", "text", "label"))
        for number in range(30):
            for label, text in kinds.items():
                writer.writerow((number, f"{text} ({number})", label))


def test_the_page_on_methods_prints_what_it_says(capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    known = dict(METHODS)
    try:
        run_page("add-a-method.md")
    finally:
        METHODS.clear()
        METHODS.update(known)
    said = capsys.readouterr().out
    assert "Gate(m=8)" in said
    assert "cannot be merged: GateAdapter has no rule for it" in said
