"""The range of a number and the letters of a path, checked before a verb sees them."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest

from mpillm.errors import UsageError
from mpillm.system.command_line import Argument, CommandParameter, Option, command_parameters


@dataclass(frozen=True)
class Settings:
    folder: Annotated[Path, Argument("A folder.")]
    files: Annotated[tuple[Path, ...], Argument("Files.", metavar="FILE…")] = ()
    count: Annotated[int, Option("Rounds.", minimum=1, maximum=1000)] = 1
    number: Annotated[int, Option("Any.")] = 0
    share: Annotated[float, Option("A share.", minimum=0, maximum=1)] = 0.5
    limit: Annotated[float, Option("Seconds.", minimum=0, finite=False)] = math.inf
    text: Annotated[str, Option("Words.")] = ""
    switch: Annotated[bool, Option("On.")] = False
    perhaps: Annotated[int | None, Option("A number or none.", minimum=2)] = None


PARAMETERS: dict[str, CommandParameter] = {one.name: one for one in command_parameters(Settings)}


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("count", 0, "--count takes 1 to 1,000, and not 0"),
        ("count", 1001, "--count takes 1 to 1,000, and not 1001"),
        ("number", 1 << 63, "--number takes -9,223,372,036,854,775,807 to "),
        pytest.param("number", -(10**5000), "not a number of 16,610 bits", id="too long to print"),
        ("share", math.nan, "--share takes a finite number, 0 to 1, and not nan"),
        ("share", 1.5, "--share takes 0 to 1, and not 1.5"),
        ("share", -1e-300, "--share takes 0 to 1"),
        ("limit", -1.0, "--limit takes 0 or more, and not -1.0"),
        ("perhaps", 1, "--perhaps takes 2 or more, and not 1"),
        ("text", "a\0b", "--text holds a NUL byte, 'a.*b'"),
        ("folder", Path("a\0b"), "FOLDER holds a NUL byte"),
        ("folder", Path("x" * 256), "FOLDER 'xxx"),
        ("files", (Path("a"), Path("é" * 128)), "FILE… 'é.*a name has at most 255 bytes"),
        ("folder", Path("d/" * 2048, "x"), "a path 4,095, not 1 and 4,097"),
    ],
)
def test_a_value_that_no_verb_can_use_is_named(name: str, value: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words) as refused:
        PARAMETERS[name].check(value)
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("count", 1),
        ("count", 1000),
        ("number", (1 << 63) - 1),
        ("share", 0.0),
        ("share", 1),
        ("limit", math.inf),
        ("perhaps", None),
        ("switch", True),
        ("text", "x" * 100_000),
        ("folder", Path("x" * 255)),
        ("folder", Path("d/" * 2047)),
    ],
)
def test_the_ends_of_the_range_are_taken(name: str, value: Any) -> None:
    PARAMETERS[name].check(value)
