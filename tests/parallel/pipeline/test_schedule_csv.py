"""Schedules to files and back; files by others; faults with their place."""

from pathlib import Path

import pytest
from mpi4py import MPI

from mpillm.errors import LayoutError
from mpillm.parallel.pipeline.schedule_catalog import SCHEDULES, make_schedule
from mpillm.parallel.pipeline.schedule_csv import read_schedule, write_schedule


@pytest.fixture
def written(folder):
    """Write a text, or bytes, into this rank's own file and returns its path."""

    def write(text):
        path = folder / f"plan-{MPI.COMM_WORLD.rank}.csv"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


@pytest.mark.parametrize("name", SCHEDULES)
def test_there_and_back(written, name):
    schedule = make_schedule(name, 3, 7)
    found = read_schedule(written(write_schedule(schedule)))
    assert found.name == f"plan-{MPI.COMM_WORLD.rank}.csv"
    assert (found.rows, found.stages, found.microbatches) == (schedule.rows, schedule.stages, 7)


def test_one_row_a_rank():
    assert write_schedule(make_schedule("1f1b", 2, 2)) == "0F0,0F1,0B0,0B1\n1F0,1B0,1F1,1B1\n"


def test_idle_cells_spaces_blank_ends_and_a_byte_order_mark(written):
    text = "\ufeff0F0, 0F1 ,,,0B0,,0B1\r\n,1F0,1B0,1F1,1B1,,\r\n,,\r\n\r\n"
    assert read_schedule(written(text)).rows == make_schedule("1f1b", 2, 2).rows


def test_older_files_call_the_half_for_the_input_b(written):
    found = read_schedule(written("0F0,0F1,0B0,0W0,0B1\n1F0,1B0,1W0,1F1,1I1,1W1\n"))
    assert [[str(action) for action in row] for row in found.rows] == [
        ["0F0", "0F1", "0I0", "0W0", "0B1"],
        ["1F0", "1I0", "1W0", "1F1", "1I1", "1W1"],
    ]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds no actions; write a row a rank"),
        (",,\n\n", "holds no actions"),
        (
            "0F0,0B0\n1F0,1X0,1B0\n",
            "row 2, column 2: '1X0' is not an action; a cell is a stage, then F, B, I or W",
        ),
        ("0F0,0SEND_F0,0B0\n", "row 1, column 2: '0SEND_F0' .*leave out messages"),
        ("0F0,-1B0\n", "row 1, column 2: '-1B0'"),
        ("0F0,0B\u0660\n", "row 1, column 2"),
        ("0F0,0B0\n1F0\n", "stage 1 needs F, and B or both I and W with microbatch 0"),
        ("0F0,0B0\n\n1F0,1B0\n", "rank 1 does nothing"),
        (
            "0F0,0B0,0F1,0B1\n1F0,1F1,1B0,1B1\n",
            "a deadlock: rank 0 cannot do 0B0 before rank 1 does 1B0",
        ),
        ("0F0,0F1\n1F0,1F1\n", "needs F, and B"),
        ("0F0,0B0,0I0,0W0\n", "and has F, B, I, W on rank 0"),
        ("0F0,0B0,999999999F0\n", "stage 1 of 1000000000 is on no rank"),
        ("0F0,0B0,0F999999999\n", "microbatch 1, and has nothing on rank 0"),
        (b"\xff\xfe0F0", "cannot read the schedule .*; name a CSV file"),
    ],
)
def test_what_is_no_schedule(written, text, words):
    with pytest.raises(LayoutError, match=words):
        read_schedule(written(text))


def test_files_that_are_no_text(folder, comm):
    for content, words in (
        (b"\x00\xff", "is not UTF-8"),
        (b"0F0,999999999F0,0B0", "stage 1 of 1000000000 is on no rank"),
        (b"0F0,0F999999999,0B0", "with microbatch"),
        (b'"' + b"x" * 200_000, "field larger than field limit"),
        (b"", "holds no actions"),
    ):
        # The folder is the same on each rank.
        path = folder / f"odd-{comm.rank}.csv"
        path.write_bytes(content)
        with pytest.raises(LayoutError, match=words):
            read_schedule(path)
    path.write_text(write_schedule(make_schedule("gpipe", 2, 2)), encoding="utf-16")
    assert read_schedule(path).ranks == 2
    with pytest.raises(LayoutError, match="should be a plain file"):
        read_schedule(Path("/dev/zero"))


def test_no_file(folder):
    with pytest.raises(LayoutError, match=r"cannot read the schedule .*none\.csv: No such file"):
        read_schedule(folder / "none.csv")
