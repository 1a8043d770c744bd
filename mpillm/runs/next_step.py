"""The next command for a run: one that works from the current folder, and acts on this run."""

from pathlib import Path

from mpillm.launch.walltime import clock_time
from mpillm.runs.history import KILLED, RUNNING, object_at
from mpillm.runs.run_files import folder_of_paths
from mpillm.runs.state import FINISHED, SUSPENDED, KeptCheckpoint, RunState
from mpillm.system.json_text import read_json
from mpillm.system.messages import command
from mpillm.tokens.dataset_folder import dataset_hash, is_dataset
from mpillm.weights.places import BEST, CHECKPOINTS, INDEX

# Options of the last submission that the next one repeats, next to its size.
REPEATED = ("partition", "account", "threads", "gpus-per-node")


def next_step(
    run_state: RunState, newest: KeptCheckpoint | None, waits: bool
) -> tuple[str, list[str]]:
    """Name the next commands in a sentence, and list them; none where the batch job `waits`."""
    run, state = run_state.run, run_state.state
    report = command(["mpillm", "report", _argument(run)])
    if state == SUSPENDED:
        return f"it waits for its process to be continued; {report} draws it", [report]
    if state == RUNNING or run_state.holder:
        return f"it continues by itself; {report} draws it", [report]
    if state == FINISHED:
        commands = [*_uses(run_state, newest), report]
        return ", ".join(commands), commands
    if waits:
        return "the job continues by itself", []
    log = f"read {_output(run_state) or 'the output of the job'}, then "
    first = {"failed": "repair the failure, then ", KILLED: log}.get(state, "")
    if run_state.recipe_path is None:
        return f"{first}continue it with the recipe that began it: none can be read in {run}", []
    if newest is None and run_state.damage.get(CHECKPOINTS):
        # Training refuses to begin again unasked.
        folder = _argument(run / CHECKPOINTS)
        return (
            f"{first}restore a checkpoint from a backup, for none in {folder} is whole; "
            "or move that folder away, and --resume begins at step 1"
        ), []
    start = (
        f"continues from step {newest.step:,}"
        if newest
        else "begins at step 1: no checkpoint was saved yet"
    )
    if newest is None and run_state.lost_checkpoint:
        start = "begins at step 1: no checkpoint is left"
    resume = _resume_command(run_state, run_state.recipe_path)
    data = (
        "" if _work_folder(run_state) else f"; its data {_data(run_state)} {_data_fault(run_state)}"
    )
    return f"{first}{resume} {start}{data}", [resume]


def _uses(run_state: RunState, newest: KeptCheckpoint | None) -> list[str]:
    """List the commands that use a trained model; none without a checkpoint."""
    if newest is None:
        return []
    # A run's folder means its newest checkpoint.
    run = run_state.run if run_state.best is None else run_state.run / CHECKPOINTS / BEST
    generate = command(["mpillm", "generate", _argument(run), "--prompt", "TEXT"])
    folder = _work_folder(run_state)
    if folder is None:
        # Its validation data is not found, so it cannot be scored from here.
        return [generate]
    return [_in_folder(folder, ["mpillm", "evaluate"], run), generate]


def _resume_command(run_state: RunState, recipe: Path) -> str:
    """Write the command that resumes the run, on as many nodes and ranks as before."""
    job, folder = run_state.job, _work_folder(run_state) or Path.cwd()
    if job.get("nodes") and job.get("seconds") and job.get("ranks_per_node"):
        size = ["--nodes", str(job["nodes"]), "--ranks-per-node", str(job["ranks_per_node"])]
        size += ["--time", clock_time(job["seconds"])]
        asked = [
            word
            for key in REPEATED
            if (value := job.get(key.replace("-", "_")))
            for word in (f"--{key}", str(value))
        ]
        return _in_folder(folder, ["mpillm", "submit"], recipe, *size, *asked, "--resume")
    ranks = run_state.attempts[-1].ranks if run_state.attempts else None
    launcher = ["mpirun", "-n", str(ranks)] if ranks and ranks > 1 else []
    return _in_folder(folder, [*launcher, "mpillm", "train"], recipe, "--resume")


def _in_folder(folder: Path, words: list[str], path: Path, *more: str) -> str:
    """Write a command with `path`, to run in `folder`: there the recipe's paths begin."""
    if folder == Path.cwd():
        return command([*words, _argument(path), *more])
    return f"{command(['cd', folder])} && {command([*words, path.absolute(), *more])}"


def _argument(path: Path) -> str:
    # A leading dash would make it an option.
    return f"./{path}" if str(path).startswith("-") else str(path)


def _data(run_state: RunState) -> str:
    path = object_at(run_state.recipe, "data").get("path")
    return path if isinstance(path, str) else ""


def _work_folder(run_state: RunState) -> Path | None:
    """Find the folder in which the recipe's relative paths begin: where its data is found.

    The current folder; that of the submission, or of the last start; or that in which `train.run`
    is this run.
    """
    data, here = _data(run_state), Path.cwd()
    started = run_state.attempts[-1].facts if run_state.attempts else {}
    noted = run_state.job.get("folder"), started.get("folder")
    folders = [here, *(Path(folder) for folder in noted if isinstance(folder, str) and folder)]
    if begin := folder_of_paths(run_state.run, run_state.recipe):
        folders.append(begin)
    if not data:
        return here
    wanted = _trained_on(run_state)
    return next((folder for folder in folders if _is_its_data(folder / data, wanted)), None)


def _is_its_data(folder: Path, wanted: str) -> bool:
    """Return whether a dataset is there that can be the run's, of which `wanted` is the hash."""
    return is_dataset(folder) and (not wanted or dataset_hash(folder) in ("", wanted))


def _data_fault(run_state: RunState) -> str:
    there = is_dataset(Path.cwd() / _data(run_state))
    return "is another dataset than it was trained on" if there else "is not found from here"


def _trained_on(run_state: RunState) -> str:
    """Return the hash of the dataset that the newest checkpoint was trained on; "" if unknown."""
    try:
        index = read_json(run_state.checkpoints[-1].folder / INDEX)
    except (IndexError, OSError, ValueError):
        return ""
    found = object_at(index, "facts").get("data") if isinstance(index, dict) else None
    return found if isinstance(found, str) else ""


def _output(run_state: RunState) -> str:
    """Return the job's output, where it still is: the run may have been moved."""
    noted = run_state.job.get("output")
    paths = [Path(noted), run_state.run / Path(noted).name] if noted else []
    return next((str(path) for path in paths if path.is_file()), "")
