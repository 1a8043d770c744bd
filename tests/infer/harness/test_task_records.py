"""Records of local files: their types are those that the library datasets gives them."""

import json
from pathlib import Path
from typing import Any

import pytest

from mpillm.errors import DataError, MpillmError
from mpillm.infer.harness.task_file import DataFiles
from mpillm.infer.harness.task_records import TaskRecords, read_split


def read(folder: Path, kind: str, text: str, **more: Any) -> TaskRecords:
    (folder / "file").write_text(text, encoding="utf-8")
    return read_split(DataFiles(kind, {"test": ("file",)}, **more), "test", folder)


def test_json_lines_arrays_and_fields(tmp_path: Path) -> None:
    rows = [{"a": 1, "b": "x"}, {"a": 2.5}, {"c": [1]}]
    wanted = [
        {"a": 1.0, "b": "x", "c": None},
        {"a": 2.5, "b": None, "c": None},
        {"a": None, "b": None, "c": [1]},
    ]
    lines = "\n".join(map(json.dumps, rows))
    for text, field in ((lines, ""), (json.dumps(rows), ""), (json.dumps({"d": rows}), "d")):
        found = read(tmp_path, "json", text, field=field)
        assert list(found.rows) == wanted
        assert found.columns == ("a", "b", "c")
    assert read(tmp_path, "json", '{"d": {"a": [1, 2]}}', field="d").rows == [{"a": 1}, {"a": 2}]


def test_columns_of_tables_have_types(tmp_path: Path) -> None:
    text = 'n,x,t,s,"e"\n1,2,true,a,\n-3,,false,"b, c",NA\n'
    assert read(tmp_path, "csv", text).rows == [
        {"n": 1, "x": 2.0, "t": True, "s": "a", "e": None},
        {"n": -3, "x": None, "t": False, "s": "b, c", "e": None},
    ]
    assert read(tmp_path, "csv", "a,b\n+1,True\n2\n").rows == [
        {"a": 1, "b": True},
        {"a": 2, "b": None},
    ]
    assert read(tmp_path, "csv", "a;b\n1_0;x\n", delimiter=";").rows == [{"a": "1_0", "b": "x"}]


def test_lines_of_text(tmp_path: Path) -> None:
    assert read(tmp_path, "text", "one\r\n\ntwo").rows == [{"text": t} for t in ("one", "", "two")]


def test_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow", reason="needs pyarrow: pip install 'mpillm[tables]'")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"a": [1, 2], "b": [["x"], []]}), tmp_path / "file")
    found = read_split(DataFiles("parquet", {"test": ("file",)}), "test", tmp_path)
    assert found.rows == [{"a": 1, "b": ["x"]}, {"a": 2, "b": []}]


@pytest.mark.parametrize(
    ("kind", "text", "rule"),
    [
        ("json", "", "file holds no record, so nothing can be scored"),
        ("csv", "a,b\n", "file holds no record"),
        ("csv", "", "file is no table with a head"),
        ("csv", "a,b\n1,2,3\n", r"a row of more cells than its head \(a, b\)"),
        ("csv", "a,b,a\n1,2,3\n", "two columns named 'a'"),
        ("json", '{"a": 1}\n{', "line 2 isn't JSON"),
        ("json", "[1]", "holds no list of JSON objects"),
        ("json", "[", "isn't JSON"),
    ],
)
def test_files_without_records(tmp_path: Path, kind: str, text: str, rule: str) -> None:
    with pytest.raises(DataError, match=rule):
        read(tmp_path, kind, text)


def test_files_and_splits_that_are_not_there(tmp_path: Path) -> None:
    data = DataFiles("json", {"test": ("nothing.jsonl",), "far": ("https://x.org/a.json",)})

    def refused(split: str) -> str:
        with pytest.raises(MpillmError) as failure:
            read_split(data, split, tmp_path)
        return str(failure.value)

    assert "data_files names nothing.jsonl, and there is no file nothing.jsonl nor" in refused(
        "test"
    )
    assert "files of the network are not fetched" in refused("far")
    assert "the split 'train' is not in dataset_kwargs.data_files, which has test" in refused(
        "train"
    )
