"""Results in a folder: written atomically, and read back unchanged from JSON and CSV."""

from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from visadapt import VisadaptError
from visadapt.experiments import Result, read_results, write_csv
from visadapt.experiments.record import Record, key_of


def result(**changes: Any) -> Result:
    base = Result(
        key="k0",
        experiment="tradeoff",
        modality="image",
        network="resnet50",
        problem="cifar10",
        contender="bottleneck m=8",
        seed=0,
        split="test",
        metric="accuracy",
        score=0.1 + 0.2,
        trained=310_016,
        head=20_490,
        backbone=23_508_032,
        seconds=1 / 3,
        bytes=1_340_000,
        lr=1e-3,
        epochs=3,
        facts={"m": 8, "source": None, "where": "last 4"},
        machine={"device": "cpu", "torch": "2.6"},
    )
    return dataclasses.replace(base, **changes)


def test_each_result_has_its_own_file_and_reads_back_unchanged(tmp_path: Path) -> None:
    record = Record(tmp_path / "deep" / "results")
    record.add(result())
    record.add(result(key="k1", seed=1))
    record.add(result(key="k1", experiment="compare", facts={}))
    folder = tmp_path / "deep" / "results"
    files = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    assert files == {"tradeoff/k0.json", "tradeoff/k1.json", "compare/k1.json"}
    reread = Record(folder)
    assert reread.get("tradeoff", "k0") == result()
    assert reread.get("compare", "k0") is None
    assert reread.find("k0") == result()
    assert read_results(folder / "tradeoff") == [result(), result(key="k1", seed=1)]


def test_csv_and_json_hold_the_same(tmp_path: Path) -> None:
    results = [result(), result(key="k1", seed=1, score=1e-9, setting="s0")]
    file = write_csv(results[::-1], tmp_path / "csv" / "tradeoff.csv")
    assert read_results(file) == read_results(tmp_path) == results
    assert read_results(file)[0].fraction == 310_016 / 23_508_032
    assert write_csv(read_results(file), tmp_path / "again.csv").read_bytes() == file.read_bytes()
    assert all(Record(tmp_path).get("tradeoff", key) for key in ("k0", "k1")), "results in a table count as results"


@pytest.mark.parametrize("name", ["=1+1", "+x", "-x", "@x", "'=x", "''", "' x", "x=1", 'a,"b'])
def test_a_table_holds_no_formula_of_a_spreadsheet_and_reads_back_unchanged(tmp_path: Path, name: str) -> None:
    results = [result(contender=name, regime=name)]
    table = write_csv(results, tmp_path / "results.csv")
    assert read_results(table) == results
    with table.open(newline="") as file:
        assert not any(cell[:1] in tuple("=+-@") for row in csv.reader(file) for cell in row if cell)


def test_older_results_have_no_setting_regime_and_number_of_samples(tmp_path: Path) -> None:
    known = result(setting="s0", regime="cpu", samples=12)
    later = ("setting", "regime", "samples")
    fields = {name: value for name, value in dataclasses.asdict(known).items() if name not in later}
    (tmp_path / "old.json").write_text(json.dumps(fields))
    assert read_results(tmp_path / "old.json") == [result()]
    table = write_csv([known], tmp_path / "old.csv").read_text().splitlines()
    assert table[0].endswith(",setting,regime,samples")
    assert table[1].endswith(",s0,cpu,12")
    assert read_results(tmp_path / "old.csv") == [known]
    (tmp_path / "old.csv").write_text("\n".join(line.rsplit(",", 3)[0] for line in table))
    assert read_results(tmp_path / "old.csv") == [result()]


def test_partial_files_are_ignored_and_files_that_are_not_results_are_named(tmp_path: Path) -> None:
    record = Record(tmp_path)
    record.add(result())
    (tmp_path / "tradeoff" / ".k1.json.abc.json").write_text('{"key": ')
    assert read_results(tmp_path) == [result()]
    (tmp_path / "tradeoff" / "k2.json").write_text('{"key": "k2"}')
    with pytest.raises(VisadaptError, match=r"k2.json is not a result"):
        Record(tmp_path)
    (tmp_path / "bad.csv").write_text("key,score\nk,1\n")
    with pytest.raises(VisadaptError, match=r"bad\.csv is not a table of results: .*it lacks 'experiment'"):
        read_results(tmp_path / "bad.csv")
    table = write_csv([result()], tmp_path / "bad.csv").read_text()
    for content in ("", "\0", "x" + table, table.replace("score", "key"), table + "k0,x\n", table.replace("e-9", "")):
        (tmp_path / "bad.csv").write_text(content)
        if content != table:
            with pytest.raises(VisadaptError, match=r"bad\.csv"):
                read_results(tmp_path / "bad.csv")
    (tmp_path / "bad.csv").unlink()
    (tmp_path / "latin.csv").write_bytes("key,score\ncafé,1\n".encode("latin-1"))
    with pytest.raises(VisadaptError, match=r"latin.csv is not a table of results: .*0xe9"):
        read_results(tmp_path / "latin.csv")
    with pytest.raises(VisadaptError, match="no folder or file of results"):
        read_results(tmp_path / "nowhere")


def test_a_key_depends_on_all_facts_but_not_on_their_order() -> None:
    assert key_of(a=1, b={"x": 1, "y": 2}) == key_of(b={"y": 2, "x": 1}, a=1)
    assert key_of(a=1) != key_of(a=2)
