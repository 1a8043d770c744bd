"""Name the extra that installs a missing package.

mpillm's own dependencies are enough for bench, doctor, schedule, prepare, submit and status.
Training and pictures need the packages of the extra `train`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from mpillm.errors import UsageError

EXTRA_OF = {
    "torch": "train",
    "tensorboard": "train",
    "matplotlib": "train",
    "safetensors": "hub",
    "gguf": "hub",
    "PIL": "pictures",
    "sacrebleu": "evaluate",
    "rouge_score": "evaluate",
    "yaml": "evaluate",
    "lm_eval": "lm-eval",
    "sklearn": "baselines",
    "gensim": "baselines",
    "pyarrow": "tables",
    "starlette": "serve",
    "uvicorn": "serve",
    "prometheus_client": "serve",
    "llguidance": "serve",
    "wandb": "wandb",
    "mlflow": "mlflow",
}


def installed(package: str) -> bool:
    """Find out whether a top-level package can be imported, without importing it."""
    return find_spec(package) is not None


def install_command(package: str) -> str:
    """Give the command that installs the extra of `package`."""
    return f"pip install 'mpillm[{EXTRA_OF[package]}]'"


def require_packages(purpose: str, *packages: str) -> None:
    """Raise UsageError, with the command that installs them, where one of `packages` is missing."""
    missing = [package for package in packages if not installed(package)]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        raise UsageError(
            f"{purpose} needs {' and '.join(missing)}, which {verb} not installed: "
            f"{install_command(missing[0])}"
        )


@contextmanager
def extras_explained() -> Iterator[None]:
    """Turn the failed import of an extra's package into a UsageError that names the extra."""
    try:
        yield
    except ModuleNotFoundError as failure:
        package = (failure.name or "").partition(".")[0]
        if package not in EXTRA_OF or installed(package):
            raise
        raise UsageError(
            f"this needs {package}, which is not installed: {install_command(package)}"
        ) from failure
