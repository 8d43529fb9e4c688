"""Writing a report: the Markdown page, its figures, and the HTML page."""

from __future__ import annotations

import os
from pathlib import Path

from visadapt.arguments import takes
from visadapt.experiments.record import read_results
from visadapt.files import make_folder, replacing
from visadapt.report.assembly import build
from visadapt.report.html_page import page
from visadapt.report.markdown_page import markdown
from visadapt.report.style import Look


@takes()
def write(results: str | os.PathLike[str], out: str | os.PathLike[str], title: str | None = None) -> list[Path]:
    """Write ``OUT.md``, ``OUT.html`` and the figures ``OUT/….svg``; the same results give the same bytes.

    Args:
        results: a folder or file of results.
        out: path of the pages without a suffix, such as ``docs/results``.
        title: title of both pages; by default it names the networks and counts problems and results.

    Returns:
        The paths of the written files, the pages first.

    Raises:
        VisadaptError: there are no results, too few, or some with the same names but different settings; matplotlib is
            not installed; or the folder cannot be written to. Everything is drawn before anything is written.

    Examples:
        >>> from visadapt.experiments import Result, write_csv
        >>> sizes = {"trained": 2000, "head": 650, "backbone": 11_176_512, "seconds": 9, "bytes": 12_000}
        >>> results = [Result(f"key{seed}", "compare", "image", "resnet18", "digits", "lora r=4", seed, "test",
        ...                   metric="accuracy", score=0.91, lr=1e-3, epochs=3, **sizes) for seed in (0, 1)]
        >>> pages = visadapt.report.write(write_csv(results, "results.csv"), "page", title="Digits")
        >>> [path.name for path in pages[:2]]
        ['page.md', 'page.html']
    """
    target = Path(out)
    report = build(read_results(results), title)
    # names may contain a dot, so suffixes are appended, not replaced
    files = {
        Path(f"{target}.md"): markdown(report, target.name).encode(),
        Path(f"{target}.html"): page(report).encode(),
        **{
            target / f"{drawing.name}.svg": drawing.render(Look())
            for section in report.sections
            for drawing in section.drawings
        },
    }
    make_folder(target)
    for path, content in files.items():
        with replacing(path) as partial:
            partial.write_bytes(content)
    return list(files)
