"""Read a YAML file of lm-evaluation-harness with those that it includes, and run no code of it."""

from pathlib import Path
from typing import Any

from mpillm.errors import UsageError
from mpillm.system.extras import require_packages
from mpillm.system.messages import explain, printable
from mpillm.system.plain_files import read_text

LARGEST = 1 << 24


def read_yaml(path: Path) -> dict[str, Any]:
    """Read the table of a file; `include` names others, whose keys it overrides.

    Raises UsageError for a file that cannot be read, for a tag such as !function, and for a circle.
    """
    require_packages("mpillm evaluate --harness", "yaml")
    return _read(path, ())


def _read(path: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    place = path.resolve()
    if place in seen:
        raise UsageError(f"{path} includes itself; take one `include` out")
    table = _parsed(path)
    included = table.pop("include", [])
    merged: dict[str, Any] = {}
    for name in included if isinstance(included, list) else [included]:
        if not isinstance(name, str):
            raise UsageError(f"{path}: include must be the name of a file, and not {name!r:.80}")
        merged |= _read(path.parent / name, (*seen, place))
    return merged | table


def _parsed(path: Path) -> dict[str, Any]:
    import yaml

    # A class of its own: the tags that it refuses are not refused to others.
    loader: Any = type("PlainLoader", (yaml.SafeLoader,), {})

    def refuse(_: yaml.SafeLoader, suffix: str, node: yaml.Node) -> None:
        value = printable(str(node.value)) if isinstance(node, yaml.ScalarNode) else "…"
        raise UsageError(
            f"{path}: line {node.start_mark.line + 1} has the tag !{suffix} ({value}), and "
            "--harness runs no code of task files; write a template, or let lm-eval itself drive "
            "the model: `mpillm lm-eval --help`"
        )

    loader.add_multi_constructor("!", refuse)
    try:
        value = yaml.load(read_text(path, most=LARGEST), loader)
    except OSError as failure:
        raise UsageError(f"--harness: cannot read {explain(failure, path)}") from failure
    except (yaml.YAMLError, RecursionError) as failure:
        text = " ".join(printable(str(failure)).split())
        raise UsageError(f"--harness: {path} is no YAML: {text:.300}; correct it") from failure
    if not isinstance(value, dict):
        raise UsageError(
            f"--harness: {path} holds no table of keys and values, but {type(value).__name__}; "
            "give a task file of lm-evaluation-harness"
        )
    return {str(key): each for key, each in value.items()}
