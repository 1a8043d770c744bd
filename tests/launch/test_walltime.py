import pytest

from mpillm.errors import UsageError
from mpillm.launch.schedulers.lsf import LSF
from mpillm.launch.schedulers.slurm import SLURM
from mpillm.launch.walltime import clock_time, seconds_of


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1:30:00", 5400),
        ("0:00:30", 30),
        ("100:00:00", 360_000),
        ("2-00:00:00", 172_800),
        ("1-23:59:59", 172_799),
        ("90m", 5400),
        ("2h", 7200),
        ("1h30m", 5400),
        ("1d12h", 129_600),
        (" 45s ", 45),
    ],
)
def test_times(text: str, seconds: int) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize(
    "text",
    [
        "",
        "90",
        "1:30",
        "1:60:00",
        "1:00:60",
        "1-24:00:00",
        "-1:00:00",
        "1.5h",
        "30m1h",
        "h",
        "2 h",
        "2h\n3m",
        "١h",
        "2H",
    ],
)
def test_what_could_mean_several_times_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="H:MM:SS"):
        seconds_of(text)


@pytest.mark.parametrize("text", ["0:00:00", "0s", "366d"])
def test_times_out_of_range(text: str) -> None:
    with pytest.raises(UsageError, match="at most 365 days"):
        seconds_of(text)


def test_times_as_the_batch_systems_read_them() -> None:
    assert clock_time(5400) == "01:30:00"
    assert clock_time(172_800) == "48:00:00"
    assert SLURM.write_time(5400) == "01:30:00"
    assert LSF.write_time(5400) == "1:30"
    assert LSF.write_time(61) == "0:02"
