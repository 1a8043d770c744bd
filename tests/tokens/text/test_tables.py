"""Records of JSON arrays, CSV, TSV, Parquet, SQuAD's JSON and parallel texts."""

import json
from pathlib import Path
from typing import Any

import pytest

from mpillm.errors import DataError
from mpillm.tokens.text.examine import examine
from mpillm.tokens.text.records import RecordError
from mpillm.tokens.text.tables import read_table

RECORDS = [{"a": "1", "b": "x, y\nz"}, {"a": "2", "b": 'ä "q"'}]
SQUAD = {
    "version": "1.1",
    "data": [
        {
            "title": "T",
            "paragraphs": [
                {
                    "context": "A b c",
                    "qas": [
                        {
                            "id": "1",
                            "question": "q?",
                            "answers": [{"text": "b", "answer_start": 2}],
                        },
                        {"id": "2", "question": "r?", "answers": []},
                    ],
                }
            ],
        }
    ],
}


def read(path: Path) -> list[Any]:
    facts = examine(str(path), True, "text", tables=True)
    assert facts.table, facts
    found = list(read_table(path, facts.table, facts.encoding))
    assert [number for number, _ in found] == list(range(1, len(found) + 1))
    return [record for _, record in found]


def write_parquet(path: Path, records: list[dict[str, Any]]) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow: pip install 'mpillm[tables]'")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(records), path)


def test_each_form_gives_the_same_records(tmp_path: Path) -> None:
    for number, indent in enumerate((None, 1)):
        path = tmp_path / f"{number}.json"
        path.write_text(json.dumps(RECORDS, indent=indent))
        assert read(path) == RECORDS
    for ending, mark in ((".csv", ","), (".tsv", "\t")):
        lines = [f"a{mark}b", f'1{mark}"x, y\nz"', "", f'2{mark}"ä ""q"""']
        path = tmp_path / f"table{ending}"
        path.write_text("\r\n".join(lines), newline="")
        assert read(path) == RECORDS
        # Spreadsheets write a byte-order mark.
        path.write_text("\r\n".join(lines), "utf-8-sig", newline="")
        assert read(path) == RECORDS
        path.write_text("\n".join(lines), "utf-16", newline="")
        assert read(path) == RECORDS
    write_parquet(tmp_path / "t.parquet", RECORDS)
    assert read(tmp_path / "t.parquet") == RECORDS


def test_squad_gives_a_record_for_each_question(tmp_path: Path) -> None:
    for number, indent in enumerate((None, 1)):
        path = tmp_path / f"{number}.json"
        path.write_text(json.dumps(SQUAD, indent=indent))
        first, second = read(path)
        assert first == {
            "id": "1",
            "title": "T",
            "context": "A b c",
            "question": "q?",
            "answers": {"text": ["b"], "answer_start": [2]},
        }
        assert second["answers"] == {"text": [], "answer_start": []}


def test_two_texts_are_read_line_by_line(tmp_path: Path) -> None:
    one, other = tmp_path / "a.en", tmp_path / "a.de"
    one.write_text("a\n\nb\x0bc\n")
    other.write_text("ä\n\nb ü\n", "utf-8-sig")
    found = [each for _, each in read_table(one, "parallel", "utf-8", str(other))]
    assert found == [{"source": "a", "target": "ä"}, {"source": "b\x0bc", "target": "b ü"}]
    other.write_text("ä\n")
    with pytest.raises(RecordError, match=r"is beyond the end of .*a\.de: .*a\.en has more lines"):
        list(read_table(one, "parallel", "utf-8", str(other)))


def test_broken_tables_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a,b\n1\n")
    with pytest.raises(RecordError, match=r"has 1 cells and its head 2 columns \(a, b\)"):
        read(tmp_path / "a.csv")
    (tmp_path / "a.json").write_text('[{"a": 1},')
    with pytest.raises(DataError, match=r"a\.json isn't JSON"):
        read(tmp_path / "a.json")
    write_parquet(tmp_path / "a.parquet", RECORDS)
    data = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(data[:-20] + b"\0" * 20)
    with pytest.raises(DataError, match="is no Parquet file that can be read"):
        read(tmp_path / "a.parquet")


def test_without_tables_such_files_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(RECORDS))
    found = examine(str(tmp_path / "a.json"), True, "text")
    assert not found.table
    assert found.kind is not None
