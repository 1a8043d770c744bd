"""Whether the hosts of a job are alike; the one that is not is named."""

from collections import Counter
from collections.abc import Mapping

from mpillm.doctor.findings import Finding, hosts_text

AREA = "hosts"
REMEDIES = {
    "MPI library": "load the same module on all hosts, or keep the environment on a file system that they share",
    "Linux": "let the site's staff bring them to one state, or leave the odd one out (sbatch --exclude=NODE)",
}
SOFTWARE = ("MPI library", "mpillm", "Python", "torch", "h5py", "numpy")
HARDWARE = (
    "ask for hosts of one kind (sbatch --constraint=… or --exclude=NODE): the slowest holds up all"
)


def judge_alike(hosts: Mapping[str, Mapping[str, str]]) -> list[Finding]:
    """`hosts`: host → what → value. One finding for each thing in which they differ, or one that they do not."""
    names = list(dict.fromkeys(what for facts in hosts.values() for what in facts))
    found = [finding for what in names if (finding := judge_one(what, hosts))]
    if found or len(hosts) < 2:
        return found
    return [Finding(AREA, "alike", "ok", f"{len(hosts)} hosts of the same {', '.join(names)}")]


def judge_one(what: str, hosts: Mapping[str, Mapping[str, str]]) -> Finding | None:
    """The odd ones are those that differ from what most have; where no value leads, all are told."""
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
