"""The cluster profile: whether the named one was measured on this cluster."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from mpillm.doctor.check_base import Check, World
from mpillm.doctor.findings import Finding, Verdict, guarded
from mpillm.errors import MpillmError

if TYPE_CHECKING:
    from mpillm.machine.cluster_profile import Cluster

AREA = "cluster profile"


class ProfileCheck(Check):
    name, area = "profile", AREA

    def examine_ranks(self, world: World) -> Iterable[Finding]:
        named = getattr(world.job.site.site, "profile", "")
        # Rank 0's word counts: the hosts may have different site files.
        path = world.comm.bcast(world.job.options.profile or (Path(named) if named else None))
        if path is None:
            return []
        # The profile needs packages that may be what is missing.
        from mpillm.machine.cluster_profile import describe_cluster

        cluster = describe_cluster(world.comm, world.node_map)
        if world.comm.rank:
            return []
        return guarded(AREA, path.name, lambda: [judge_profile(path, cluster)])


def judge_profile(path: Path, cluster: "Cluster") -> Finding:
    """Judge whether the profile is of this `cluster`. A stale one does no harm: it is ignored."""
    from mpillm.machine.cluster_profile import load_profile

    warnings: list[str] = []
    try:
        load_profile(path, warnings.append, cluster)
    except MpillmError as failure:
        return _finding("unusable", "error", str(failure))
    if warnings:
        return _finding("stale", "warning", warnings[0])
    return Finding(AREA, path.name, "ok", f"{path} is of this cluster")


def _finding(name: str, verdict: Verdict, sentence: str) -> Finding:
    """Split load_profile's sentence, which ends in its remedy."""
    found, _, remedy = sentence.rpartition("; ")
    return Finding(AREA, name, verdict, found, remedy)
