"""Compiled layers give the results of the uncompiled ones; a failure leaves the run without."""

import pytest
import torch
from mpi4py import MPI

from mpillm.machine.node_map import map_nodes
from mpillm.models.decoder import DecoderConfig
from mpillm.models.part_module import PartModule, create
from mpillm.parallel.compiling import compile_layers

SPEC = DecoderConfig(layers=2, width=16, heads=2, context=8, vocab_size=20)


def test_a_failure_is_one_warning_on_all_ranks(
    comm: MPI.Intracomm, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: torch.nn.Module) -> None:
        self._compiled_call_impl = print
        if comm.rank == comm.size - 1:
            raise RuntimeError("no such\n thing")

    monkeypatch.setattr(torch.nn.Module, "compile", fail)
    part = create(SPEC, 1)
    said: list[str] = []
    assert not compile_layers([part], 2, comm, map_nodes(comm), said.append)
    assert len(said) == 1
    assert "so the run computes without: " in said[0]
    ids = torch.zeros(2, 8, dtype=torch.long)
    assert part.forward_part({"ids": ids}, ()).outputs


def test_an_architecture_without_layers_to_compile_is_named(comm: MPI.Intracomm) -> None:
    said: list[str] = []
    assert not compile_layers([PartModule(SPEC)], 2, comm, map_nodes(comm), said.append)
    assert "the architecture names no layers" in said[0]
