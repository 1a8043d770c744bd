"""The site file of `mpillm submit`: whether it can be read."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from mpillm.doctor.check_base import Check, JobView, SiteReading
from mpillm.doctor.findings import Finding
from mpillm.errors import MpillmError

AREA, NAME = "batch system", "site file"
OWN_FILE = "~/.config/mpillm/site.toml"
EXAMPLES = "; jobs/sites has examples"


class SiteFileCheck(Check):
    name, area = NAME, AREA

    def examine_job(self, job: JobView) -> Iterable[Finding]:
        return [judge_site(job.site)]


def read_site(path: Path | None, environment: Mapping[str, str]) -> SiteReading:
    """Read the site file `path`, else that of MPILLM_SITE, else the user's own."""
    try:
        # launch.site needs packages that may be what is missing.
        from mpillm.launch.site import SITE_VARIABLE, load_site

        named = str(path or environment.get(SITE_VARIABLE, ""))
        try:
            return SiteReading(load_site(path, environment), named)
        except MpillmError as failure:
            return SiteReading(None, named, str(failure))
    except ImportError as failure:
        return SiteReading(None, "", str(failure), package_missing=True)


def judge_site(reading: SiteReading) -> Finding:
    file = reading.named or OWN_FILE
    if reading.package_missing:
        found = f"cannot be read without its package: {reading.failure}"
        remedy = "install the missing package, see under software"
        return Finding(AREA, NAME, "warning", found, remedy)
    if reading.failure:
        found, remedy = reading.failure.removesuffix(EXAMPLES), f"correct {file}{EXAMPLES}"
        return Finding(AREA, NAME, "error", found, remedy)
    if not reading.named and reading.site == type(reading.site)():
        found = "none, or an empty one; `mpillm submit` works without"
        return Finding(AREA, NAME, "ok", found)
    return Finding(AREA, NAME, "ok", f"{file} can be read")
