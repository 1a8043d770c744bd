"""Tables, CSV, JSON and the picture, from made-up times."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest

from mpillm.bench.bench_options import BenchOptions
from mpillm.bench.collectives import COLUMNS, rows_of
from mpillm.bench.context import binding, buffers_text, cores_text
from mpillm.bench.plot import draw_bandwidth, drawn
from mpillm.bench.results import Section, as_csv, as_json, figure, print_sections
from mpillm.bench.sample_arrays import Shape
from mpillm.system.console import Console


def section() -> Section:
    rows = []
    for count in (256, 4096):
        shape = Shape("allreduce", count, "float32", 4, 0, True)
        seconds = {
            "auto": np.array([1e-5, 2e-5]),
            "mpi": np.array([2e-5, 4e-5]),
            "floor": np.array([1e-6, 1e-6]),
        }
        rows += rows_of(
            shape, seconds, {"auto": {"chosen": "ring", "wrong": 0}, "mpi": {"wrong": 0}}
        )
    return Section("allreduce", "allreduce: 4 ranks", rows, COLUMNS)


def test_rows_hold_the_figures() -> None:
    auto, library, floor = section().rows[:3]
    assert (auto["algorithm"], auto["chosen"], auto["bytes"], auto["count"]) == (
        "auto",
        "ring",
        1024,
        256,
    )
    assert auto["mpi_ratio"] == library["mpi_ratio"] * 2 == 2
    assert auto["bus_bytes_per_second"] == 1.5 * auto["algorithm_bytes_per_second"]
    assert auto["floor_ratio"] == pytest.approx(1e-6 / 1.5e-5)
    assert floor["mpi_ratio"] is floor["bus_bytes_per_second"] is floor["wrong"] is None


def test_the_table_has_the_columns_that_people_know() -> None:
    out = io.StringIO()
    print_sections({"ranks": "4"}, [section()], ["gloo is left out"], Console(stream=out))
    text = out.getvalue()
    for word in (
        "bytes",
        "count",
        "type",
        "algorithm",
        "#wrong",
        "auto (ring)",
        "floor (pass in place)",
        "note: gloo",
    ):
        assert word in text
    heads = list(section().columns)
    assert heads[:4] == ["bytes", "count", "type", "algorithm"]
    assert heads[-5:] == ["algbw GB/s", "busbw GB/s", "#wrong", "× mpi", "of floor"]
    assert [section().columns[head](section().rows[0]) for head in heads][-1] == "0.067"


def test_csv_is_one_rectangle() -> None:
    other = Section("gemm", "gemm", [{"edge": 64, "flops_per_second": 1.5}], {})
    rows = list(csv.DictReader(io.StringIO(as_csv([section(), other]))))
    assert [row["benchmark"] for row in rows] == ["allreduce"] * 6 + ["gemm"]
    assert float(rows[0]["median_seconds"]) == pytest.approx(1.5e-5)
    assert rows[0]["edge"] == rows[-1]["algorithm"] == rows[2]["wrong"] == ""
    assert as_csv([]).strip() == "benchmark"


def test_json_is_one_object() -> None:
    text = as_json({"ranks": "4"}, [section()], ["a note"])
    value = json.loads(text)
    assert text.count("\n") == 1
    assert set(value) == {"schema", "version", "header", "results", "notes"}
    assert value["results"][0]["benchmark"] == "allreduce"
    assert len(value["results"][0]["rows"]) == 6


def test_the_picture_is_a_png_with_the_floor(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    lines = dict(drawn([section()], 4)[0][1])
    assert list(lines) == ["auto", "mpi", "memory floor"]
    assert [size for size, _ in lines["memory floor"]] == [1024, 16384]
    draw_bandwidth([section()], 4, path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert list(tmp_path.iterdir()) == [path]
    assert drawn([Section("gemm", "gemm", [{"edge": 64}], {})], 4) == []


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (0, "0"),
        (0.01234, "0.012"),
        (1.234, "1.23"),
        (12.34, "12.3"),
        (12345.6, "12,346"),
    ],
)
def test_figures_have_three_digits(value: float | None, text: str) -> None:
    assert figure(value) == text


def test_binding_is_told() -> None:
    assert binding([{0, 1}, {0, 1}], 2).startswith("none")
    assert binding([{0}, {1}], 2) == "rank 0: core 0; rank 1: core 1"
    assert cores_text({0, 1, 2, 5}) == "cores 0–2, 5"


def test_buffers_are_told() -> None:
    assert "node-shared for auto and shared" in buffers_text(BenchOptions("all"), True)
    assert "malloc" not in buffers_text(BenchOptions("all"), False)
    fresh = buffers_text(
        BenchOptions("all", buffers="fresh", node_shared=False, in_place=True), False
    )
    assert "fresh" in fresh
    assert "; private; in place" in fresh
