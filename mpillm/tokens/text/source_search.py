"""Find the files of sources; what a search of a folder passes over is counted by its kind."""

import os
import re
import stat
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path

from mpillm.errors import UsageError
from mpillm.system.atomic import is_special
from mpillm.system.messages import explain, one_line
from mpillm.tokens.dataset_folder import is_dataset
from mpillm.tokens.text.file_kinds import UNPACKERS, special_kind

STDLIB = "stdlib"
# Not the library itself: installed packages, its tests, and bundled programs.
NOT_LIBRARY = {
    "site-packages",
    "dist-packages",
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "ensurepip",
    "__pycache__",
}
MOST_SOURCES = 1 << 16  # /doc_source has two bytes
MOST_ENDINGS = 3
LINK = "link to a folder"
COMPRESSED_ENDINGS = {ending for _, endings, _ in UNPACKERS.values() for ending in endings}
PLURALS = {
    "pipe": "pipes",
    "socket": "sockets",
    "device": "devices",
    "document": "documents",
    "picture or sound": "pictures or sounds",
    "table or array": "tables or arrays",
    "archive": "archives",
    "program": "programs",
    LINK: "links to folders",
    "broken link": "broken links",
    "dataset of mpillm": "datasets of mpillm",
    "run of mpillm": "runs of mpillm",
    "checkpoint of mpillm": "checkpoints of mpillm",
}
# The index of a checkpoint begins with its format.
OUR_HEAD_BYTES = 4096
CHECKPOINT = re.compile(rb'"format"\s*:\s*"mpillm\.checkpoint"')
# A run's folder has both; a recipe alone may lie next to anything.
RUN_FILES = ("recipe.toml", "history.jsonl")


@dataclass
class PassedOver:
    """What searches pass over: how many of each kind, and the endings of their names."""

    counts: Counter[str] = field(default_factory=Counter)
    endings: dict[str, Counter[str]] = field(default_factory=dict)

    def add(self, group: str, name: str = "") -> None:
        self.counts[group] += 1
        endings = Path(name).suffixes
        if endings:
            both = endings[-1] in COMPRESSED_ENDINGS
            ending = one_line("".join(endings[-2 if both else -1 :]))
            self.endings.setdefault(group, Counter())[ending] += 1

    def text(self) -> str:
        """Write `2 compressed (.jsonl.gz), 1 pipe`."""
        return ", ".join(
            f"{number:,} {PLURALS.get(group, group) if number > 1 else group}{self._endings(group)}"
            for group, number in sorted(self.counts.items(), key=lambda item: (-item[1], item[0]))
        )

    def _endings(self, group: str) -> str:
        common = sorted(self.endings.get(group, Counter()).items(), key=lambda i: (-i[1], i[0]))
        names = [ending for ending, _ in common[:MOST_ENDINGS]]
        more = ["…"] if len(common) > MOST_ENDINGS else []
        return f" ({', '.join([*names, *more])})" if names else ""


@dataclass(frozen=True)
class FoundFile:
    """A file of source number `source`; `named` by the user, or found in a folder."""

    source: int
    path: str
    named: bool


def find_files(
    sources: Sequence[str], glob: str, exclude: Path | None, passed: PassedOver
) -> list[FoundFile]:
    """List the files of all sources, in an order that only their names decide.

    `exclude`: a folder to skip. Raises UsageError for a source that is missing or no text.
    """
    if not sources or len(sources) > MOST_SOURCES:
        raise UsageError(
            f"prepare takes 1 to {MOST_SOURCES:,} sources, got {len(sources)}; "
            "name a file, a folder or stdlib"
        )
    pattern = GlobPattern(glob)
    found: list[FoundFile] = []
    for number, name in enumerate(sources):
        mode = _mode_of(name)
        if mode is None:
            root = Path(sysconfig.get_path("stdlib"))
            own = _Search(root, GlobPattern("**/*.py"), None, PassedOver(), NOT_LIBRARY).files()
        elif stat.S_ISDIR(mode):
            _refuse_ours(Path(name))
            own = _Search(Path(name), pattern, exclude, passed, set()).files()
            if not own:
                raise UsageError(
                    f"the source {one_line(name)} is empty: no file matches {glob!r}"
                    f"{_but(passed)}; give one with text, or another --glob"
                )
        else:
            found.append(FoundFile(number, name, named=True))
            continue
        found += [FoundFile(number, str(path), named=False) for path in own]
    return found


def _but(passed: PassedOver) -> str:
    return f" (passed over: {passed.text()})" if passed.counts else ""


def _mode_of(name: str) -> int | None:
    """Return the mode of a source that is a plain file or a folder; None for the library.

    Raises UsageError for any other source.
    """
    if not name:
        raise UsageError(
            "a source is an empty text, perhaps a shell variable that is not set; "
            "name a file, a folder or stdlib ('.' is the current folder)"
        )
    path = Path(name)
    try:
        mode = path.stat().st_mode
    except FileNotFoundError as failure:
        if name == STDLIB:
            return None
        hint = " (it is a broken link)" if path.is_symlink() else ""
        if name == "-":
            hint = " and standard input is none; write it to a file first"
        raise UsageError(
            f"there is no source {one_line(name)}{hint} (looked in {one_line(Path.cwd())}); "
            "give a text file, a .jsonl file, a folder or the word stdlib"
        ) from failure
    except (OSError, ValueError) as failure:
        # A name with a NUL byte is a ValueError.
        why = explain(failure, path) if isinstance(failure, OSError) else f"{name!r}: {failure}"
        raise UsageError(f"cannot read the source {why}") from failure
    if is_special(path) and not stat.S_ISDIR(mode):
        raise UsageError(
            f"the source {one_line(name)} is {special_kind(mode).name}, which can be read once "
            "and by one process; prepare reads its sources in parts, on all ranks; "
            "write it to a file first: `COMMAND > corpus.txt`"
        )
    return mode


def _refuse_ours(path: Path) -> None:
    kind = our_kind(path)
    if kind:
        uses = {
            "dataset of mpillm": "train on it as it is: `data.path` in a recipe names it",
            "run of mpillm": "name the text that it was trained on",
        }
        raise UsageError(
            f"the source {one_line(path)} is a {kind}, not text; "
            f"{uses.get(kind, 'name a folder of text')}"
        )


def our_kind(folder: Path) -> str:
    """Return what a folder of ours is, by its contents; "" for any other."""
    if is_dataset(folder):
        return "dataset of mpillm"
    if CHECKPOINT.search(_head(folder / "index.json")):
        return "checkpoint of mpillm"
    if all((folder / name).is_file() for name in RUN_FILES):
        return "run of mpillm"
    return ""


def _head(path: Path) -> bytes:
    """Read the beginning of a plain file; nothing of any other."""
    try:
        if not path.is_file():
            return b""
        with path.open("rb") as file:
            return file.read(OUR_HEAD_BYTES)
    except OSError:
        return b""


class GlobPattern:
    """A pattern of relative names: `*`, `?` and `[…]` match within a name, `**` any folders.

    `**` at the end matches every file below.
    """

    def __init__(self, glob: str) -> None:
        """Parse `glob`. Raises UsageError for what matches nothing."""
        parts = [part for part in glob.split("/") if part not in ("", ".")]
        why = ""
        if not parts:
            why = "it is empty"
        elif glob.startswith("/") or ".." in parts:
            why = "it leads out of the folder"
        elif any("**" in part and part != "**" for part in parts):
            why = "** is a whole part between slashes"
        if why:
            raise UsageError(f"--glob {glob!r} is not a pattern: {why}; write one like '**/*.txt'")
        self._parts = [*parts, "*"] if parts[-1] == "**" else parts

    def matches(self, name: str) -> bool:
        # The numbers of the parts that may match next: no pattern takes exponential time.
        states = self._skipped({0})
        for word in name.split("/"):
            states = self._skipped(
                {
                    state + (self._parts[state] != "**")
                    for state in states
                    if state < len(self._parts)
                    and (self._parts[state] == "**" or fnmatchcase(word, self._parts[state]))
                }
            )
        return len(self._parts) in states

    def _skipped(self, states: set[int]) -> set[int]:
        """Add what follows a `**`, which may match no folder."""
        found = set(states)
        for state, part in enumerate(self._parts):
            if state in found and part == "**":
                found.add(state + 1)
        return found


class _Search:
    """A walk through one folder."""

    def __init__(
        self,
        root: Path,
        pattern: GlobPattern,
        exclude: Path | None,
        passed: PassedOver,
        skip: set[str],
    ) -> None:
        self._root, self._pattern, self._exclude = root, pattern, exclude
        self._passed, self._skip = passed, skip

    def files(self) -> list[Path]:
        """List the files that match, sorted by name. Links to files are followed.

        Links to folders are not: a folder that is reached twice would be read twice, and a link
        may lead out of the corpus.
        """
        found = sorted(self._walk(""))
        return [self._root / name for name in found]

    def _walk(self, start: str) -> Iterator[str]:
        # A list, not a recursion: folders may be nested deeper than Python's stack.
        folders = [start]
        while folders:
            folder = folders.pop()
            for entry in self._entries(folder):
                name = f"{folder}/{entry.name}" if folder else entry.name
                if entry.name.startswith("."):
                    self._passed.add("hidden")
                elif entry.is_dir(follow_symlinks=False):
                    if self._enters(name, entry.name):
                        folders.append(name)
                elif self._is_file(entry, self._pattern.matches(name)):
                    yield name

    def _entries(self, folder: str) -> list["os.DirEntry[str]"]:
        try:
            with os.scandir(self._root / folder) as entries:
                return list(entries)
        except OSError as failure:
            raise UsageError(f"cannot list the folder {explain(failure)}") from failure

    def _enters(self, name: str, last: str) -> bool:
        path = self._root / name
        if last in self._skip or (self._exclude and path.resolve().is_relative_to(self._exclude)):
            return False
        kind = our_kind(path)
        if kind:
            self._passed.add(kind)
        return not kind

    def _is_file(self, entry: "os.DirEntry[str]", matches: bool) -> bool:
        """Return whether to read a plain file, or a link to one; count what `matches` else."""
        try:
            mode = entry.stat().st_mode
        except OSError:
            mode = 0
        if stat.S_ISDIR(mode):
            # Whatever its name: files below it might match.
            self._passed.add(LINK)
        elif matches and not stat.S_ISREG(mode):
            self._passed.add(special_kind(mode).group if mode else "broken link")
        return matches and stat.S_ISREG(mode)
