"""A sample of benchmarks/parity.py: cases that cover each pair of settings, against one process."""

import importlib.util
import sys
from pathlib import Path

import pytest
from mpi4py import MPI

PATH = Path(__file__).parents[2] / "benchmarks/parity.py"
specification = importlib.util.spec_from_file_location("parity", PATH)
parity = importlib.util.module_from_spec(specification)
sys.modules["parity"] = parity
specification.loader.exec_module(parity)

STEPS = 4


def test_the_chosen_cases_cover_each_pair_of_settings() -> None:
    cases = parity.all_cases(4)
    chosen = parity.covering(cases)
    assert len(chosen) < len(cases) / 4
    settings = {(case.sizes, case.zero) for case in cases}
    assert {(case.sizes, case.zero) for case in chosen} == settings


@pytest.mark.slow("trains in many layouts")
def test_each_layout_has_the_numbers_of_one_process(data: Path, comm: MPI.Intracomm) -> None:
    cases = parity.covering(parity.all_cases(comm.size))
    found = parity.compare(cases, data, comm, STEPS)
    wrong = {str(case): found[str(case)] for case in cases}
    wrong = {str(c): found[str(c)] for c in cases if not parity.is_right(c, found[str(c)])}
    assert wrong == {}


@pytest.mark.slow("exchanges checkpoints of several layouts")
def test_layouts_read_each_others_checkpoints(
    data: Path, folder: Path, comm: MPI.Intracomm
) -> None:
    cases = parity.twelve(comm.size)[::3]
    assert parity.exchange(cases, folder, data, comm) == 0
