"""Build `tweets.tsv.gz`, `movies.tsv.gz`, `products.tsv.gz`, `editorials.tsv.gz`: texts with human sentiment.

A text is positive if its mean human score (-4 … 4) is at least 0.5, negative if it is at most -0.5, neutral between:
the mean rounded to the nearest whole step of the raters' scale.  `--check` prints what justifies the threshold.
"""

import argparse
import ast
import gzip
import io
import tarfile

import common
import numpy as np

SOURCE = "vaderSentiment==3.3.2"
THRESHOLD = 0.5
# domain -> (file in the archive, whether an id is DOCUMENT_SENTENCE)
DOMAINS = {
    "tweets": ("tweets", False),
    "movies": ("movieReviewSnippets", False),
    "products": ("amazonReviewSnippets", True),
    "editorials": ("nytEditorialSnippets", True),
}
SHARES = {"train": 0.7, "validation": 0.1, "test": 0.2}


def read(kind: str) -> dict[str, list[list[str]]]:
    """Read the rows (id, mean score, then text or raters' scores) of each domain."""
    folder = common.sdist(SOURCE, "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9")
    rows = {}
    with tarfile.open(folder / "additional_resources/hutto_ICWSM_2014.tar.gz") as tar:
        for domain, (stem, _) in DOMAINS.items():
            member = tar.extractfile(f"hutto_ICWSM_2014/{stem}_{kind}.txt")
            assert member is not None
            lines = member.read().decode("utf-8").split("\r\n")
            rows[domain] = [line.split("\t") for line in lines if line]
    return rows


def label(score: float) -> str:
    """The class of a mean score."""
    return "positive" if score >= THRESHOLD else "negative" if score <= -THRESHOLD else "neutral"


def splits(groups: list[str], seed: int = 0) -> list[str]:
    """Assign a split to every row, keeping groups (the sentences of one document) together."""
    names = sorted(set(groups))
    order = np.random.Generator(np.random.PCG64(seed)).permutation(len(names))
    ends = np.round(np.cumsum(list(SHARES.values())) * len(names)).astype(int)
    place = {names[i]: list(SHARES)[int(np.searchsorted(ends, rank, "right"))] for rank, i in enumerate(order)}
    return [place[g] for g in groups]


def build() -> None:
    """Write the four files."""
    seen: set[str] = set()
    for domain, rows in read("GroundTruth").items():
        kept = []
        for key, score, raw in rows:
            text = " ".join(raw.split())
            # the same words twice, in one domain or in two, would leak test texts into training; a text
            # without a letter or digit ("!") has no content
            content = "".join(c for c in text.casefold() if c.isalnum())
            if content and content not in seen:
                seen.add(content)
                kept.append((key.split("_")[0] if DOMAINS[domain][1] else key, float(score), text))
        out = io.StringIO()
        out.write("split\tlabel\tscore\ttext\n")
        for split, (_, mean, text) in zip(splits([k[0] for k in kept]), kept, strict=True):
            out.write(f"{split}\t{label(mean)}\t{mean:.4f}\t{text}\n")
        packed = io.BytesIO()
        # no name and no time in the header; gzip.compress() would leave the header to the Python version
        with gzip.GzipFile("", "wb", 9, packed, mtime=0) as file:
            file.write(out.getvalue().encode())
        (common.DATA / f"{domain}.tsv.gz").write_bytes(packed.getvalue())
    common.record()


def check() -> None:
    """Print class shares, raters' agreement and the share of unstable labels for several thresholds."""
    print(f"{'domain':10} {'threshold':>9} {'negative':>8} {'neutral':>8} {'positive':>8}   agree  unstable   s.e.")
    for domain, rows in read("anonDataRatings").items():
        raters = [np.array(ast.literal_eval(row[3])) for row in rows]
        means = np.array([r.mean() for r in raters])
        error = np.median([r.std(ddof=1) / len(r) ** 0.5 for r in raters])
        rng = np.random.Generator(np.random.PCG64(0))
        redrawn = np.array([rng.choice(r, (20, len(r))).mean(1) for r in raters])
        for threshold in (0.05, 0.25, 0.5, 0.75, 1.0):
            classes = np.sign(means) * (np.abs(means) >= threshold)
            shares = [(classes == c).mean() for c in (-1, 0, 1)]
            agree = np.mean([(np.sign(r) == c).mean() for r, c in zip(raters, classes, strict=True)])
            unstable = (np.sign(redrawn) * (np.abs(redrawn) >= threshold) != classes[:, None]).mean()
            print(f"{domain:10} {threshold:9} " + " ".join(f"{s:8.1%}" for s in shares), end="")
            print(f"  {agree:6.1%}  {unstable:7.1%}   {error:.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="print class shares and raters' agreement by threshold")
    check() if parser.parse_args().check else build()
