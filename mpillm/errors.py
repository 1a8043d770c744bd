"""What can go wrong, as one tree.

    MpillmError
    ├── UsageError        what was typed: a path, an option, a value
    ├── RecipeError       a recipe's key, type or number
    ├── LaunchError       MPI itself: no library, a wrong start
    ├── LayoutError       a mesh or a batch that the ranks cannot share
    ├── CommError         a message or a reduction that cannot be done
    ├── DataError         a source, a shard, a manifest, a tokenizer
    │   └── MismatchError two parts that do not fit: shards and tokenizer, model and data
    ├── CheckpointError   a checkpoint that cannot be written or read
    ├── DivergedError     a loss or a gradient that is no longer a number
    └── StoppedError      no fault: a run that was asked to stop, and is saved

Each message holds the rule, the values and the remedy. The command line prints it without a
traceback and exits with `exit_code`.
"""


class MpillmError(Exception):
    """The root: every error that is the user's to mend."""

    exit_code = 1
    kind = "error"
    """The word ahead of the message."""


class UsageError(MpillmError):
    exit_code = 2


class RecipeError(MpillmError, ValueError):
    """A ValueError too: a settings class may raise it from `__post_init__` under pydantic."""

    exit_code = 2


class LaunchError(MpillmError):
    pass


class LayoutError(MpillmError):
    exit_code = 2


class CommError(MpillmError):
    pass


class DataError(MpillmError):
    pass


class MismatchError(DataError):
    pass


class CheckpointError(MpillmError):
    pass


class DivergedError(MpillmError):
    exit_code = 3


class StoppedError(MpillmError):
    """Its exit code is sysexits' EX_TEMPFAIL, on which a batch script submits the job again."""

    exit_code = 75
    kind = "stopped"
