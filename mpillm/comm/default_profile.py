"""The default profile: the choice of algorithms where the cluster has no profile of its own.

It is a file of rules, default_profile.json, as Open MPI's "tuned" component has them. Every rule
that fits a call adds its algorithms, in the order of the file, and the first that can run here is
taken. Keys of a rule:

- operations, ranks, library (part of its name), from_bytes, below_bytes: of the call and the job.
- team: whether all ranks are on one node and share memory; several_nodes: whether there are more
  nodes.
- node_shared: whether the arrays are in node-shared memory.
- library_sums: whether the MPI library sums this element type right and fast; true where nothing is
  summed.
- prefer: the algorithms that the rule adds. A key that is absent fits every call.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Self

from mpillm.comm.algorithms.schedule import REDUCING
from mpillm.comm.buffers import SHORT_FLOATS
from mpillm.errors import CommError
from mpillm.machine.node_map import NodeMap

FILE = Path(__file__).with_name("default_profile.json")
SCHEMA, VERSION = "mpillm default profile", 1
SHORT_INTEGERS = ("int8", "uint8", "int16", "uint16")
# Libraries sum 16-bit floats slowly or not at all. Open MPI saturates short integers, where ours
# wrap.
BADLY_SUMMED = frozenset((*SHORT_FLOATS, *SHORT_INTEGERS))


@dataclass(frozen=True)
class Rule:
    """One rule of the file; None fits every call."""

    prefer: tuple[str, ...]
    operations: tuple[str, ...] | None = None
    library: str = ""
    ranks: int | None = None
    team: bool | None = None
    several_nodes: bool | None = None
    node_shared: bool | None = None
    library_sums: bool | None = None
    from_bytes: float = 0
    below_bytes: float = math.inf

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Self:
        """Read a rule; raises CommError for an unknown key, which would make it fit too often."""
        known = {part.name for part in fields(cls)}
        if unknown := sorted(set(value) - known):
            raise CommError(
                f"a rule of the default profile has the unknown key {unknown[0]!r}; known are "
                f"{', '.join(sorted(known))}"
            )
        tuples = {key: tuple(part) for key, part in value.items() if isinstance(part, list)}
        return cls(**{**value, **tuples})

    def fits(self, operation: str, facts: Mapping[str, object], library: str) -> bool:
        """Return whether the rule holds for calls of some size; `facts`: the keys that must be
        equal.
        """
        return (
            (self.operations is None or operation in self.operations)
            and self.library in library
            and all(getattr(self, key) in (None, value) for key, value in facts.items())
        )


@cache
def load_rules(path: Path = FILE) -> tuple[Rule, ...]:
    """Read the rules of the default profile, once."""
    value = json.loads(path.read_text(encoding="utf-8"))
    if (value.get("schema"), value.get("version")) != (SCHEMA, VERSION):
        raise CommError(f"{path} is not version {VERSION} of a {SCHEMA}; install mpillm again")
    return tuple(map(Rule.from_json, value["rules"]))


# A job makes calls of few kinds and many sizes, and asks at each call.
@lru_cache(maxsize=1024)
def fitting_rules(operation: str, library: str, **facts: object) -> tuple[Rule, ...]:
    """Return the rules that fit calls of these facts, whatever their size, see `Rule.fits`."""
    return tuple(rule for rule in load_rules() if rule.fits(operation, facts, library))


def library_sums(operation: str, element: str) -> bool:
    """Return whether the MPI library sums `element` right and fast; True where `operation` sums
    nothing.
    """
    return operation not in REDUCING or element not in BADLY_SUMMED


@dataclass(frozen=True)
class DefaultProfile:
    """The default profile on a job of these nodes, with the question that a cluster's profile
    answers.
    """

    node_map: NodeMap

    def best(
        self,
        operation: str,
        nbytes: int,
        element: str,
        nodes: int,
        ranks: int,
        allowed: Sequence[str],
        device: str = "cpu",
        node_shared: bool = False,
    ) -> str | None:
        """Return the first of `allowed` that the rules prefer."""
        rules = fitting_rules(
            operation,
            self.node_map.library,
            ranks=ranks,
            team=self.node_map.on_one_node and self.node_map.shares_memory,
            several_nodes=nodes > 1,
            node_shared=node_shared,
            library_sums=library_sums(operation, element),
        )
        for rule in rules:
            if rule.from_bytes <= nbytes < rule.below_bytes:
                for name in rule.prefer:
                    if name in allowed:
                        return name
        return None
