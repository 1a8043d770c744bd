"""Homogeneous hosts: whether all have the same software and hardware; name the one that differs."""

from collections import Counter
from collections.abc import Iterable, Mapping

from mpillm.doctor.check_base import Check, World
from mpillm.doctor.findings import Finding, hosts_text

AREA = "hosts"
REMEDIES = {
    "MPI library": "load the same module on all hosts, "
    "or keep the environment on a file system that they share",
    "Linux": "ask the site's staff for one state, or exclude the odd one (sbatch --exclude=NODE)",
}
SOFTWARE = ("MPI library", "mpillm", "Python", "torch", "h5py", "numpy")
HARDWARE = (
    "ask for hosts of one kind (sbatch --constraint=… or --exclude=NODE): the slowest delays all"
)


class AlikeCheck(Check):
    name, area = "alike", AREA

    def examine_ranks(self, world: World) -> Iterable[Finding]:
        return judge_alike(world.facts)


def judge_alike(hosts: Mapping[str, Mapping[str, str]]) -> list[Finding]:
    """Compare host → name → value; one finding for each difference, or one without any."""
    names = list(dict.fromkeys(what for facts in hosts.values() for what in facts))
    found = [finding for what in names if (finding := judge_one(what, hosts))]
    if found or len(hosts) < 2:
        return found
    return [Finding(AREA, "alike", "ok", f"{len(hosts)} hosts of the same {', '.join(names)}")]


def judge_one(what: str, hosts: Mapping[str, Mapping[str, str]]) -> Finding | None:
    """Name the hosts that differ from the most common value; all hosts where no value leads."""
    values = {host: facts.get(what, "none") for host, facts in hosts.items()}
    ranking = Counter(values.values()).most_common()
    if len(ranking) == 1:
        return None
    clear = ranking[0][1] > ranking[1][1]
    texts = []
    for value, number in ranking[1:] if clear else ranking:
        having = [host for host, own in values.items() if own == value]
        texts.append(f"{hosts_text(having)} ha{'s' if number == 1 else 've'} {value}")
    found = "; ".join(texts) + (
        f", the other {ranking[0][1]} have {ranking[0][0]}" if clear else ""
    )
    remedy = REMEDIES.get(what) or (REMEDIES["MPI library"] if what in SOFTWARE else HARDWARE)
    return Finding(AREA, f"{what} differs", "warning", found, remedy)
