"""Problems and sampled completions in the files of HumanEval (Chen et al. 2021), as JSON lines.

problems    {"task_id": "add", "prompt": "def add(a, b):\\n", "test": "def check(add):\\n    …",
             "entry_point": "add"}
samples     {"task_id": "add", "completion": "    return a + b\\n"}, any number of a problem
"""

from dataclasses import dataclass
from pathlib import Path

from mpillm.errors import DataError
from mpillm.infer.programs.run_programs import joined_program
from mpillm.system.messages import some_of
from mpillm.system.strict_lines import strict_lines

FIELDS = ("task_id", "prompt", "test", "entry_point")


@dataclass(frozen=True)
class ProblemSet:
    """The names of problems, and the programs of each in the order of the samples' file."""

    names: tuple[str, ...]
    programs: tuple[tuple[str, ...], ...]


def read_problem_set(problems: Path, samples: Path) -> ProblemSet:
    """Join each sample with the prompt and the tests of its problem.

    Raises DataError, which names the file and the line, and for a problem without a sample: leaving
    it out would raise the score.
    """
    known: dict[str, dict[str, str]] = {}
    for place, line in strict_lines(problems, FIELDS):
        name = line["task_id"]
        if name in known:
            raise DataError(f"{place}: the task_id {name!r} is there twice; keep one")
        if not line["entry_point"].isidentifier():
            raise DataError(
                f"{place}: the entry_point {line['entry_point']!r} is no name of a function; name "
                "the one that the tests check"
            )
        known[name] = line
    if not known:
        raise DataError(f"{problems} has no problem; write a line of JSON for each")
    programs: dict[str, list[str]] = {name: [] for name in known}
    for place, line in strict_lines(samples, ("task_id", "completion")):
        name = line["task_id"]
        if name not in known:
            raise DataError(
                f"{place}: the task_id {name!r} is not in {problems}, which has {some_of(known)}"
            )
        prompt, test, entry = (known[name][field] for field in FIELDS[1:])
        programs[name].append(joined_program(prompt, line["completion"], test, entry))
    if missing := [name for name, own in programs.items() if not own]:
        raise DataError(
            f"{samples} has no sample of {some_of(missing)} ({len(missing):,} of {len(known):,} "
            f"problems of {problems}); write one, an empty completion if need be"
        )
    return ProblemSet(tuple(known), tuple(tuple(own) for own in programs.values()))
