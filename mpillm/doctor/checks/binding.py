"""Binding: whether the ranks of a host leave most of its cores idle."""

from collections.abc import Iterable

from mpillm.doctor.check_base import Check, World
from mpillm.doctor.findings import Finding
from mpillm.launch.placement import narrow_binding


class BindingCheck(Check):
    name, area = "binding", "host"

    def examine_ranks(self, world: World) -> Iterable[Finding]:
        found, _, remedy = narrow_binding(world.places).partition("; ")
        return [Finding(self.area, self.name, "warning", found, remedy)] if found else []
