"""The pages: well-formed, self-contained, accessible, for light and dark themes and for phones."""

from __future__ import annotations

import base64
import dataclasses
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from tests.report import fake_results
from visadapt import VisadaptError
from visadapt.experiments.record import write_csv
from visadapt.report import Drawing, Look, build, page, plot, write
from visadapt.report.style import LINES, MARKERS

VOID = {"meta", "link", "img", "source", "br"}


class Reader(HTMLParser):
    """The elements of a page, checked for matching end tags."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        assert len(dict(attrs)) == len(attrs), f"an attribute of {tag} twice"
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def of(self, *tags: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.elements if tag in tags]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the report of a few experiments, as ``visadapt report`` does."""
    folder = tmp_path_factory.mktemp("report")
    results = [*fake_results.transfer(), *fake_results.ablation(layers=3), *fake_results.decathlon()]
    write_csv(results, folder / "results.csv")
    files = write(folder / "results.csv", folder / "docs.v1", "Results <of> tests")
    assert files[:2] == [folder / "docs.v1.md", folder / "docs.v1.html"]
    return folder


@pytest.fixture(scope="module")
def html(written: Path) -> Reader:
    return Reader((written / "docs.v1.html").read_text(encoding="utf-8"))


def test_the_page_is_well_formed_and_has_a_language(html: Reader) -> None:
    assert html.open == []
    assert html.of("html") == [{"lang": "en"}]
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in html.of("meta")
    assert len(html.of("h1")) == len(html.of("main")) == 1


def test_the_page_loads_nothing_from_elsewhere(written: Path, html: Reader) -> None:
    urls = [
        value
        for _, attributes in html.elements
        for key, value in attributes.items()
        if key in ("src", "srcset", "href")
    ]
    assert urls
    assert all(url.startswith(("data:", "#")) for url in urls)
    assert not html.of("script", "iframe")
    text = (written / "docs.v1.html").read_text(encoding="utf-8")
    assert "url(" not in text
    assert "@import" not in text


def test_every_figure_is_there_once_with_an_alternative_text_and_both_themes(html: Reader) -> None:
    images = html.of("img")
    assert len(images) == len(html.of("figure")) == 4
    assert not html.of("source")
    assert all(len(image["alt"]) > 40 for image in images)
    svg = base64.b64decode(images[0]["src"].partition(",")[2])
    assert svg.startswith(b"<?xml")
    dark = re.search(rb"<style>@media \(prefers-color-scheme: dark\) \{(.*?)\}</style>", svg, re.DOTALL)
    assert dark
    replaced = dict(re.findall(rb'fill: (#\w+)"\] \{ fill: (#\w+) !important', dark.group(1)))
    assert replaced[Look().paper.encode()] == Look("dark").paper.encode()
    assert b"http" not in re.sub(
        rb'xmlns(:\w+)?="[^"]+"|<metadata>.*?</metadata>|<!DOCTYPE[^>]+>', b"", svg, flags=re.DOTALL
    )


def test_links_within_the_page_have_targets(html: Reader) -> None:
    names = [attributes["id"] for _, attributes in html.elements if "id" in attributes]
    assert len(names) == len(set(names))
    assert [link["href"] for link in html.of("a")] == ["#claims", "#ablation", "#transfer", "#decathlon"]
    assert {link["href"][1:] for link in html.of("a")} <= set(names)


def test_scrollable_regions_can_be_reached_by_keyboard(html: Reader) -> None:
    regions = [attributes for attributes in html.of("div") if attributes.get("class") == "scroll"]
    assert len(regions) == len(html.of("table")) == len(html.of("caption"))
    regions += html.of("figure")
    assert all(region["tabindex"] == "0" and region["aria-label"] for region in regions)


def test_names_in_results_are_escaped() -> None:
    names = {None: "x", '"y&': "x"}
    results = [
        dataclasses.replace(
            fake_results.result("transfer", "resnet50", problem, "b", 0, 1, facts={"source": source}), network="<b>"
        )
        for source, problem in names.items()
    ]
    text = page(build(results))
    reader = Reader(text)
    assert reader.open == []
    assert not reader.of("b")
    assert "&lt;b&gt;: score in %" in text


GOLDEN = """# Results &lt;of&gt; tests
## Claims
| claim | source | case | verdict | measured | training runs |
## Which layers' adapters matter
![Triangular heat map for bottleneck m=64 on minilm, tweets
![Triangular heat map for bottleneck m=64 on resnet50, cifar10
**Change of the score in points, norms kept; halves of the network: mean per removed layer**
| network | problem | method | worst layer | lower half | upper half | all layers |
## Transfer between domains
![Matrices of points gained, side by side. minilm
**minilm: mean gain over the other domains and seeds**
| domain | learns: points | 95 % interval | starts others: points | 95 % interval |
**minilm: score in %**
| learns | from scratch | from cola | from movies | from tweets |
**resnet50: mean gain over the other domains and seeds**
| domain | learns: points | 95 % interval | starts others: points | 95 % interval |
**resnet50: score in %**
| learns | from scratch | from cifar10 | from fashion-mnist | from mnist |
## One number for many domains
![Bars of the decathlon score on resnet50 over cifar10, fashion-mnist and mnist
**resnet50: accuracy in % per domain, and the score**
| method | cifar10 | fashion-mnist | mnist | score | parameters / backbone |
## Environments
"""


def test_the_markdown_has_its_parts_in_order(written: Path) -> None:
    lines = (written / "docs.v1.md").read_text(encoding="utf-8").splitlines()
    shown = []
    for number, line in enumerate(lines):
        if line.startswith(("#", "**")) or (line.startswith("|") and not lines[number - 1].startswith("|")):
            shown.append(line)
        elif line.startswith("!["):
            shown.append(line.partition(":")[0])
    assert shown == GOLDEN.splitlines()
    width = {line.count("|") for line in lines if line.startswith("| minilm |")}
    assert width == {8}


def test_the_markdown_links_to_existing_figures(written: Path) -> None:
    text = (written / "docs.v1.md").read_text(encoding="utf-8")
    links = re.findall(r"!\[[^\]]{40,}\]\((docs\.v1/[\w.-]+\.svg)\)", text)
    assert len(links) == text.count("![") == 4
    assert {written / link for link in links} == set((written / "docs.v1").iterdir())


def test_the_same_results_give_the_same_bytes(tmp_path: Path) -> None:
    write_csv(fake_results.decathlon(), tmp_path / "results.csv")
    first, second = (
        {path.name: path.read_bytes() for path in write(tmp_path / "results.csv", tmp_path / name / "report")}
        for name in ("a", "b")
        if not (tmp_path / name).mkdir()
    )
    assert first == second


def test_a_report_has_a_title_of_its_own_and_opens_with_the_method_to_take() -> None:
    report = build(list(fake_results.compare()))
    assert re.fullmatch(r"Adapters on [\w, ]+: \d+ problems, [\d,]+ results", report.title)
    text = page(report)
    assert text.index("Which method should I take?") < text.index("<h2>Claims")
    assert report.advice is not None
    networks = {r.network for r in fake_results.compare()}
    assert {row[0] for row in report.advice.rows} == networks


def test_nothing_is_written_for_too_few_results(tmp_path: Path) -> None:
    write_csv([fake_results.result("tradeoff", "resnet50", "cifar10", "norms only", 0, 0)], tmp_path / "results.csv")
    with pytest.raises(VisadaptError, match="1 results are too few"):
        write(tmp_path / "results.csv", tmp_path / "report")
    assert [path.name for path in tmp_path.iterdir()] == ["results.csv"]


def luminance(colour: str) -> float:
    """Compute the relative luminance of WCAG 2."""
    parts = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(first: str, second: str) -> float:
    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_colours_contrast_with_the_background_and_series_differ(theme: str) -> None:
    look = Look(theme)
    assert contrast(look.ink, look.paper) > 7
    assert all(contrast(look.colour(i), look.paper) > 2.2 for i in range(6))
    styles = [look.series(i) for i in range(6)]
    assert len({style["color"] for style in styles}) == len({style["marker"] for style in styles}) == 6
    assert len(set(map(str, LINES))) == len(set(MARKERS)) == 6


@pytest.mark.parametrize("look", [Look(), Look("dark"), Look("light", 3.7)], ids=str)
def test_every_figure_can_be_drawn_in_every_look(look: Look) -> None:
    results = [
        *fake_results.compare(),
        *fake_results.tradeoff(),
        *fake_results.init_scale(),
        *fake_results.sequence(),
        *fake_results.modality(),
    ]
    report = build([r for r in results if r.network == "resnet50"])
    for drawing in (drawing for section in report.sections for drawing in section.drawings):
        svg = drawing.render(look)
        width = float(re.search(rb'width="([\d.]+)pt"', svg).group(1))
        assert width == pytest.approx(72 * look.width)
        assert look.paper.encode() in svg


def test_plot_writes_by_suffix(tmp_path: Path) -> None:
    results = [r for r in fake_results.compare() if r.problem == "cifar10" and r.split == "test"]
    assert plot(results, tmp_path / "new" / "size.png", "cifar10").read_bytes()[:4] == b"\x89PNG"
    assert plot(results, tmp_path / "size.svg").read_bytes().startswith(b"<?xml")


def test_without_matplotlib_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(VisadaptError, match=r"pip install 'visadapt\[plots\]'"):
        Drawing("a", "nothing", lambda look: None).render(Look())


PROBE = """<!DOCTYPE html><html><body style="margin:0"><iframe src="{page}" width="390" height="800"></iframe><script>
onload = () => {{
  const page = document.querySelector("iframe").contentDocument, root = page.documentElement;
  page.querySelectorAll("details").forEach(each => each.open = true);
  const images = [...page.images];
  document.title = JSON.stringify({{
    overflow: root.scrollWidth - root.clientWidth,
    blind: images.filter(i => !i.complete || !i.naturalWidth).length,
    legible: images.every(i => i.clientWidth >= 500),
    images: images.length,
  }});
}};
</script></body></html>"""


@pytest.mark.slow
def test_a_browser_renders_the_page_for_a_phone(written: Path, browser: list[str]) -> None:
    probe = written / "probe.html"
    probe.write_text(PROBE.format(page="docs.v1.html"), encoding="utf-8")
    command = [*browser, "--dump-dom", "--virtual-time-budget=10000", probe.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    title = re.search(r"<title>(.*?)</title>", shown)
    assert title, shown[-500:]
    assert title.group(1) == '{"overflow":0,"blind":0,"legible":true,"images":4}'


@pytest.mark.slow
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_browser_renders_the_page_in_light_and_dark(written: Path, browser: list[str], theme: str) -> None:
    shot = written / f"{theme}.png"
    scheme = f"--blink-settings=preferredColorScheme={0 if theme == 'dark' else 1}"
    command = [*browser, "--window-size=1000,2400", scheme, f"--screenshot={shot}", (written / "docs.v1.html").as_uri()]
    subprocess.run(command, capture_output=True, timeout=120, check=True)
    with Image.open(shot) as image:
        colours = image.convert("RGB").getcolors(1 << 24)
        paper = max(colours)[1]
    assert "#{:02x}{:02x}{:02x}".format(*paper) == Look(theme).paper
    assert len(colours) > 100, "there is text and there are figures"
