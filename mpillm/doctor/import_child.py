"""A child of doctor: import the named modules in turn, and print the result of each.

`import_child.py SYS_PATH NAME…` prints a JSON object a line: {"name", "failure", "facts"}. A module
that takes the process down has no line: it is the next in order.
"""

import importlib
import json
import sys
from types import ModuleType
from typing import Any


def facts_of(name: str, module: ModuleType) -> dict[str, Any]:
    if name == "h5py":
        return {"hdf5": module.version.hdf5_version}
    if name == "torch":
        cuda = module.cuda
        count = cuda.device_count() if cuda.is_available() else 0
        return {
            "cuda": module.version.cuda or "",
            "hip": module.version.hip or "",
            "gpus": [cuda.get_device_name(index) for index in range(count)],
        }
    return {}


def main() -> None:
    sys.path += [folder for folder in json.loads(sys.argv[1]) if folder not in sys.path]
    for name in sys.argv[2:]:
        failure, facts = "", {}
        try:
            facts = facts_of(name, importlib.import_module(name))
        except Exception as raised:
            failure = f"{type(raised).__name__}: {raised}".splitlines()[0]
        sys.stdout.write(json.dumps({"name": name, "failure": failure, "facts": facts}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
