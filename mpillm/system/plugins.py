"""Find a plug-in by name: a catalogue's entry, or `package.module:Name` of a user's own package.

Each kind of plug-in (verb, algorithm, schedule, architecture, task, metric, optimizer, check, batch
system) has one catalogue: a read-only table of its names. There is no registration call.
"""

import importlib
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, TypeVar

from mpillm.errors import UsageError

Base = TypeVar("Base")


def is_plugin(name: str) -> bool:
    """Distinguish a plug-in's `package.module:Name` from a catalogue's name."""
    module, colon, attribute = name.partition(":")
    return bool(colon) and all(part.isidentifier() for part in [*module.split("."), attribute])


def load_plugin(name: str, catalog: Mapping[str, str], what: str) -> Any:
    """Import the object that `name` names: an entry of `catalog`, or `package.module:Name`.

    `what` is the kind of plug-in, for the message. Raises UsageError with the nearest known name
    where there is no such entry. Raises it with the reason where the import fails.
    """
    target = catalog.get(name, name)
    if not is_plugin(target):
        near = get_close_matches(name, catalog, n=1, cutoff=0.5)
        hint = f", did you mean {near[0]}?" if near else ""
        raise UsageError(
            f"no {what} is called {name!r}{hint} (known: {', '.join(catalog)}; "
            f"your own is named package.module:Name)"
        )
    module, _, attribute = target.partition(":")
    try:
        loaded = importlib.import_module(module)
    except (Exception, SystemExit) as failure:
        # An entry of the catalogue lacks a package, which the caller explains.
        if name in catalog:
            raise
        reason = str(failure).partition("\n")[0]
        if isinstance(failure, ImportError):
            text, remedy = reason, "install its package, or set PYTHONPATH"
        else:
            text, remedy = f"{type(failure).__name__}: {reason}", f"correct the module {module}"
        raise UsageError(f"the {what} {name} cannot be imported: {text}; {remedy}") from failure
    if not hasattr(loaded, attribute):
        near = get_close_matches(attribute, dir(loaded), n=1, cutoff=0.5)
        hint = f"; did you mean {module}:{near[0]}?" if near else ""
        raise UsageError(f"the {what} {name}: module {module} has no {attribute}{hint}")
    return getattr(loaded, attribute)


def load_class(name: str, catalog: Mapping[str, str], what: str, base: type[Base]) -> type[Base]:
    """Import the class that `name` names, which must derive from `base`. Raises UsageError."""
    found = load_plugin(name, catalog, what)
    if isinstance(found, type) and issubclass(found, base):
        return found
    raise UsageError(
        f"the {what} {name} must name a class that derives from {base.__module__}.{base.__name__}, "
        f"not {found!r}"
    )
