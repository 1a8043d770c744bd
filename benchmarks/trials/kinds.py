"""The kinds of trials: each makes its fault from a seeded generator, and judges what came of it.

A trial gets a copy of the workspace that is its own, and returns its findings. It is right where
there are none: the verb did its work as without the fault, or refused in one message.
"""

import ctypes
import json
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mpillm.system.command_line import Argument, CommandParameter, command_parameters
from mpillm.system.plugins import load_plugin
from mpillm.verbs.verb_catalog import VERBS

from .child import Outcome, Running, run_verb, temporary_files
from .workspace import (
    DATA,
    PAIR_DATA,
    RUN,
    STEPS,
    copy_workspace,
    digest_of,
    lines_of,
    trained_by,
    weights_of,
)

FRESH = ("train", "recipe.toml")
RESUME = tuple(f"train {RUN}/recipe.toml --resume".split())
PREPARE = tuple(f"prepare texts --out {DATA} --vocab-size 300 --validation 0.1".split())
CLONE_NEWNS, MS_REC, MS_PRIVATE = 0x00020000, 0x4000, 1 << 18


@dataclass
class Trial:
    """One trial: its folder, its chance, and what was found."""

    folder: Path
    chance: random.Random
    mpirun: Sequence[str]
    """How this site starts two ranks; empty: no launcher is here."""
    reference: Mapping[str, Any]
    """What the verbs give without a fault."""
    title: str = ""
    ways: dict[str, int] = field(default_factory=dict)
    """How its verbs ended: "worked", "refused", "noticed" and so on, with their number."""
    findings: list[str] = field(default_factory=list)

    def count(self, way: str) -> None:
        self.ways[way] = self.ways.get(way, 0) + 1

    def take(self, done: Outcome) -> Outcome:
        """Count a verb's end, with the faults that any end can have."""
        self.count("refused" if done.code else "worked")
        self.findings += [f"mpillm {' '.join(done.words)[:200]}: {fault}" for fault in done.faults]
        return done

    def wait_within(self, line: Sequence[str], launcher: Sequence[str] = ()) -> None:
        """Sleep until some moment of the verb's run, by the time that it takes undisturbed."""
        time.sleep(self.chance.random() * self.reference["seconds"][_launched(line, launcher)])

    def run(self, line: Sequence[str], limits: Callable[[], None] | None = None) -> Outcome:
        return self.take(run_verb(line, self.folder, limits))


def reference_of(folder: Path, mpirun: Sequence[str]) -> dict[str, Any]:
    """Run what trials compare with: scores, a text, weights, files and times without a fault."""
    found: dict[str, Any] = {
        "weights": weights_of(folder / RUN),
        **{data: digest_of(folder / data) for data in (DATA, PAIR_DATA)},
    }
    seconds = found["seconds"] = {}
    for line in (line for verb in VERBS for line in lines_of(verb)):
        # Of its own, as in a trial: the run that one line continues is not what another reads.
        own = copy_workspace(folder, folder.with_name("reference-line"))
        done = run_verb(line.split(), own)
        seconds[line] = done.seconds
        if line.startswith(("evaluate", "generate")) or line in trained_by():
            assert not done.code, done.err
            found[line] = _outcome_of(line, done, own)
        shutil.rmtree(own)
    for words, launcher in ((FRESH, ()), (FRESH, mpirun), (PREPARE, ())):
        if words is FRESH:
            shutil.rmtree(folder / RUN)
        else:
            shutil.rmtree(folder / DATA)
        seconds[_launched(words, launcher)] = run_verb(words, folder, launcher=launcher).seconds
    return found


def _outcome_of(line: str, done: Outcome, folder: Path) -> object:
    run = trained_by().get(line)
    return weights_of(folder / run) if run else _result(done)


def _launched(words: Sequence[str], launcher: Sequence[str]) -> str:
    return " ".join([*launcher[:1], *words])


def _result(done: Outcome) -> object:
    """Return a verb's result without paths and times: JSON as values, else its text."""
    try:
        value = json.loads(done.out)
    except ValueError:
        return done.out
    return {
        key: inner
        for key, inner in value.items()
        if isinstance(inner, dict | int | float) and "second" not in key
    }


# Kills and signals ---------------------------------------------------------------------------


def kill(trial: Trial) -> None:
    """Kill training or prepare at some moment; what is left must lead to the same end."""
    chance = trial.chance
    if chance.random() < 0.25:
        shutil.rmtree(trial.folder / DATA)
        running = Running(PREPARE, trial.folder)
        trial.wait_within(PREPARE)
        trial.title = "SIGKILL to prepare"
        _kill(trial, running)
        trial.run(PREPARE)
        _compare(trial, "dataset", digest_of(trial.folder / DATA), trial.reference[DATA])
    else:
        shutil.rmtree(trial.folder / RUN)
        two = bool(trial.mpirun) and chance.random() < 0.25
        trial.title = f"SIGKILL to training on {1 + two} ranks"
        launcher = trial.mpirun if two else ()
        running = Running(FRESH, trial.folder, launcher=launcher)
        trial.wait_within(FRESH, launcher)
        _kill(trial, running)
        _finish(trial)
    _nothing_left(trial)


def _kill(trial: Trial, running: Running) -> None:
    running.send(signal.SIGKILL)
    done = running.wait()
    trial.count("killed" if done.code < 0 else "done before")


def _finish(trial: Trial) -> None:
    """Resume a run to its end; its weights must be those of an undisturbed one."""
    if (trial.folder / RUN / "recipe.toml").exists():
        trial.run(RESUME)
    else:
        trial.run((*FRESH, "--resume"))
    _compare(trial, "weights", weights_of(trial.folder / RUN), trial.reference["weights"])


def signalled(trial: Trial) -> None:
    """Send a signal to some verb at some moment; it ends in order, and can be run again."""
    chance = trial.chance
    number = chance.choice((signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP))
    verb = chance.choice(list(VERBS))
    line = FRESH if verb == "train" else tuple(chance.choice(lines_of(verb)).split())
    if verb == "train":
        shutil.rmtree(trial.folder / RUN)
    trial.title = f"{number.name} to {verb}"
    running = Running(line, trial.folder)
    trial.wait_within(line)
    running.send(number)
    done = running.wait()
    trial.count("stopped" if done.code else "done before")
    trial.findings += [f"{trial.title}: {fault}" for fault in done.faults]
    if running.left:
        trial.findings.append(f"{trial.title}: left in TMPDIR {running.left[:3]}")
    if verb == "train":
        _finish(trial)
    _nothing_left(trial)


# Damaged files -------------------------------------------------------------------------------

# What else a verb reads that its line does not name.
READ_WITH = {DATA: (RUN, "recipe.toml"), PAIR_DATA: ("pairs.toml",)}
RECIPES = ("recipe.toml", "pairs.toml")
NAMED = (*READ_WITH, RUN, *RECIPES, "texts", "texts.jsonl", "pairs.jsonl", "rows.csv", "site.toml")
# A file of these is an aid to people: damage in it may change what is shown, and nothing else.
AIDS = ("metrics.jsonl", "history.jsonl", "outcome", "loss.png", "events", "report.html")


def damaged(trial: Trial) -> None:
    """Damage one file, and run each verb that reads it."""
    path, what = _damage_some_file(trial)
    name = str(path.relative_to(trial.folder))
    trial.title = f"{what} in {name}"
    for verb in VERBS:
        for line in lines_of(verb):
            if _reads(line, name):
                _judge_reading(trial, line, name)


def _damage_some_file(trial: Trial) -> tuple[Path, str]:
    files = [
        path
        for path in sorted(trial.folder.rglob("*"))
        if path.is_file() and not path.is_symlink() and "jobs" not in path.parts
    ]
    # Many texts are alike; the files of the dataset and the run are each of a kind.
    rare = [path for path in files if "texts" not in path.parts]
    path = trial.chance.choice(rare if trial.chance.random() < 0.9 else files)
    return path, damage(path, trial.chance)


def damage(path: Path, chance: random.Random) -> str:
    """Damage a file in one of many ways; say how."""
    data = path.read_bytes()
    # Small damage is the likelier, and the harder to find.
    ways = ["bit", "byte", "cut"] * 2 + ["folder", "fifo", "absent", *DAMAGES]
    way = chance.choice(ways + ["word"] * 4 if data[:1] == b"{" else ways)
    if way == "word":
        return _damage_json(path, chance)
    if way in ("folder", "fifo", "absent"):
        path.unlink()
        if way != "absent":
            (path.mkdir if way == "folder" else lambda: os.mkfifo(path))()
        return way
    place = chance.randrange(len(data)) if data else 0
    path.write_bytes(DAMAGES[way](data, place, chance))
    return way


DAMAGES: Mapping[str, Callable[[bytes, int, random.Random], bytes]] = {
    "bit": lambda data, at, chance: _changed(
        data, at, lambda byte: byte ^ 1 << chance.randrange(8)
    ),
    "byte": lambda data, at, chance: _changed(data, at, lambda _: chance.randrange(256)),
    "cut": lambda data, at, _: data[:at],
    "longer": lambda data, _, chance: data + chance.randbytes(chance.randint(1, 99)),
    "zeros": lambda data, at, _: data[:at] + bytes(len(data[at : at + 64])) + data[at + 64 :],
    "noise": lambda data, _, chance: chance.randbytes(min(len(data), 5_000) + 1),
    "empty": lambda _data, _at, _chance: b"",
}


def _changed(data: bytes, at: int, change: Callable[[int], int]) -> bytes:
    return data[:at] + bytes([change(data[at])]) + data[at + 1 :] if data else data


def _damage_json(path: Path, chance: random.Random) -> str:
    """Replace one value of a JSON file by one of another kind."""
    try:
        value = json.loads(path.read_text())
    except ValueError:
        path.write_text("null\n")
        return "null"
    at = value
    while True:
        keys = list(at) if isinstance(at, dict) else list(range(len(at)))
        if not keys:
            break
        key = chance.choice(keys)
        if isinstance(at[key], dict | list) and at[key] and chance.random() < 0.85:
            at = at[key]
            continue
        odd: tuple[object, ...] = (
            None,
            -1,
            0,
            2**60,
            1.5,
            "",
            "../../secret",
            "/etc/passwd",
            [],
            {},
            True,
            "x" * 9_999,
        )
        at[key] = chance.choice(odd)
        break
    path.write_text(json.dumps(value, indent=1) + "\n")
    return "another value"


def _reads(line: str, name: str) -> bool:
    words = line.split()
    named = {one for one in NAMED for word in words[1:] if (word + "/").startswith(f"{one}/")}
    named |= {data for data, users in READ_WITH.items() if named.intersection(users)}
    return any(name == one or name.startswith(f"{one}/") for one in named)


def _judge_reading(trial: Trial, line: str, name: str) -> None:
    run = trial.folder / RUN
    spare = trial.folder / "spare"
    shutil.copytree(run, spare, ignore=lambda folder, names: _special(folder, names))
    done = trial.run(line.split())
    if not done.code and not done.faults and not any(aid in name for aid in AIDS):
        found, expected = _outcome_of(line, done, trial.folder), trial.reference.get(line)
        silent = expected is not None and found != expected and name not in RECIPES
        if line.startswith("prepare --verify"):
            silent = not _whole_again(trial, line.split()[-1])
        if silent and _verify_finds(trial, name):
            trial.count("found by --verify")
        elif silent and not _said(done):
            trial.findings.append(f"silent: {trial.title}: mpillm {line} gives another result")
    if line.startswith("train") and RUN in line:
        shutil.rmtree(run)
        shutil.move(spare, run)
        _put_back(trial, name, spare)
    else:
        shutil.rmtree(spare)


def _special(folder: str, names: list[str]) -> list[str]:
    return [n for n in names if not (Path(folder, n).is_file() or Path(folder, n).is_dir())]


def _put_back(trial: Trial, name: str, spare: Path) -> None:
    """Make a fifo again that the copy of the run left out."""
    path = trial.folder / name
    if trial.title.startswith("fifo") and name.startswith(RUN) and not path.exists():
        os.mkfifo(path)


def _whole_again(trial: Trial, data: str) -> bool:
    """Return whether a dataset differs from its first state in nothing that is trusted."""
    first, now = trial.reference[data], digest_of(trial.folder / data)
    return all(now.get(name) == value for name, value in first.items())


def _verify_finds(trial: Trial, name: str) -> bool:
    """Return whether `prepare --verify` finds the damage of a shard.

    A token that became another one of the vocabulary is known by its hash alone, and shards are
    hashed there and nowhere else.
    """
    data = str(Path(name).parent)
    if data not in (DATA, PAIR_DATA) or not name.endswith(".h5"):
        return False
    done = run_verb(("prepare", "--verify", data), trial.folder)
    return done.code == 1 and Path(name).name in done.err


def _said(done: Outcome) -> bool:
    """Return whether a verb that worked differently said so."""
    text = (done.out + done.err).lower()
    return any(word in text for word in ("warning", "passing over", " was ", "changed"))


# Full disks ----------------------------------------------------------------------------------


def full_disk(trial: Trial) -> None:
    """Let the disk be full after some bytes; old files stay whole, and the next start works."""
    verb = trial.chance.choice(("train", "prepare", "report", "schedule", "bench"))
    size = int(2 ** trial.chance.uniform(8, 19))
    place = {"train": RUN, "prepare": "prepared"}.get(verb, "made")
    trial.title = f"{verb} with {size:,} bytes of disk left"
    target = trial.folder / place
    line: Sequence[str] = lines_of(verb)[0].split()
    if verb in ("train", "prepare"):
        shutil.rmtree(target)
        target.mkdir()
        line = FRESH if verb == "train" else PREPARE
    real = can_mount()
    limits = (lambda: small_disk(target, size)) if real else (lambda: small_files(size))
    trial.title += "" if real else " a file"
    trial.run(line, limits)
    if verb == "train":
        _finish(trial)
    elif verb == "prepare":
        trial.run((*PREPARE, "--overwrite"))
        _compare(trial, "dataset", digest_of(trial.folder / DATA), trial.reference[DATA])
    _nothing_left(trial)


def small_files(size: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def small_disk(place: Path, size: int) -> None:
    """Mount a disk of `size` bytes over `place`, which this process alone sees."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNS) or libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None):
        raise OSError(ctypes.get_errno(), "unshare")
    options = f"size={max(size // 4096, 1) * 4096},mode=755".encode()
    if libc.mount(b"tmpfs", os.fsencode(place), b"tmpfs", 0, options):
        raise OSError(ctypes.get_errno(), "mount")


_mounts: list[bool] = []


def can_mount() -> bool:
    """Return whether this process may mount a disk of its own; tried once, in a child."""
    if not _mounts:
        pid = os.fork()
        if not pid:
            try:
                small_disk(Path("/mnt"), 4096)
            except OSError:
                os._exit(1)
            os._exit(0)
        _mounts.append(os.waitpid(pid, 0)[1] == 0)
    return _mounts[0]


# Two at once ---------------------------------------------------------------------------------

# Lines that write one place; the recipe's run is a new one.
PAIRS: Sequence[tuple[str, str]] = (
    (" ".join(PREPARE), " ".join(PREPARE)),
    (" ".join(PREPARE), f"{' '.join(PREPARE)} --overwrite"),
    (f"{' '.join(PREPARE)} --overwrite", "train recipe.toml"),
    ("train recipe.toml", "train recipe.toml"),
    ("train recipe.toml", f"report {RUN} --out made/report.html"),
    (" ".join(RESUME), " ".join(RESUME)),
    (" ".join(RESUME), f"evaluate {RUN} --json"),
    (f"report {RUN}", f"report {RUN}"),
    ("schedule gpipe --ranks 2 --microbatches 3 --csv made/a.csv",) * 2,
    ("bench allreduce --sizes 8 --iterations 3 --csv made/bench.csv",) * 2,
    ("bench gemm --sizes 8 --iterations 2 --save made/profile.json",) * 2,
)


def pair(trial: Trial) -> None:
    """Start two verbs that write one place; one does the work, neither loses it."""
    first, second = trial.chance.choice(PAIRS)
    trial.title = f"{first} | {second}"
    fresh = first.startswith(("prepare", "train recipe"))
    if fresh:
        shutil.rmtree(trial.folder / (DATA if first.startswith("prepare") else RUN))
        if "--overwrite" in first:
            trial.run(PREPARE)
    one = Running(first.split(), trial.folder)
    time.sleep(trial.chance.choice((0.0, trial.chance.uniform(0, 0.4), trial.chance.uniform(0, 1))))
    two = Running(second.split(), trial.folder)
    ends = [trial.take(running.wait()) for running in (one, two)]
    trial.findings += [f"left in TMPDIR: {run.left[:3]}" for run in (one, two) if run.left]
    if first == second and all(done.code for done in ends):
        trial.findings.append(f"both fail: {ends[0].says} | {ends[1].says}")
    if first.startswith("prepare"):
        _compare(trial, "dataset", digest_of(trial.folder / DATA), trial.reference[DATA])
    if "train recipe" in first:
        _finish(trial)
    _nothing_left(trial)


# Odd values ----------------------------------------------------------------------------------

WHOLE: tuple[str, ...] = (
    "-1",
    "0",
    "1",
    "2147483648",
    "9223372036854775808",
    "1" + "0" * 30,
    "1e3",
    "nan",
    "",
    "x",
)
REAL: tuple[str, ...] = (
    "nan",
    "inf",
    "-inf",
    "1e308",
    "1e-320",
    "-0",
    "0",
    "-1",
    "1e400",
    "",
    "x",
    "0x10",
)
TEXT: tuple[str, ...] = (
    "",
    " ",
    "a\nb",
    "\x1b[2J\x07",
    "é" * 300,
    "x" * 6_000,
    "\udcff",
    "--",
    "-",
    "$(id)",
    "../..",
    "[bold]x",
    "%s%n{}",
    "0",
    "nan",
    "a,b,,c",
    "a=b",
    "train.steps=0",
    "train.batch=99999999999999999999",
    "model.layers=1000000000000",
    "model.vocab_size=1e12",
    "optimizer.learning_rate=inf",
    "os.path:join",
    "absent.module:Name",
    "1:0",
    "0:1:x1",
    "1:99999999999999:+1",
    "900G",
    "١٢",
)
PLACES: tuple[str, ...] = (
    "",
    ".",
    "absent/deep/x",
    "made/" + "n" * 300,
    "made/a\nb",
    "recipe.toml/x",
    "made/loop",
)
PLACES += ("made/fifo", "made/link", "made/\udcff", "texts", "recipe.toml", RUN, DATA, "made/é'\"$")


def odd_options(trial: Trial) -> None:
    """Give one or two odd values to the options of a verb."""
    verb = trial.chance.choice(list(VERBS))
    words = trial.chance.choice(lines_of(verb)).split()
    (trial.folder / "made/loop").symlink_to("loop")
    (trial.folder / "made/link").symlink_to("target")
    os.mkfifo(trial.folder / "made/fifo")
    reader = _read_forever(trial.folder / "made/fifo")
    parameters = list(command_parameters(load_plugin(verb, VERBS, "verb")))
    for _ in range(trial.chance.choice((1, 1, 2))):
        words = _with_odd_value(words, trial.chance.choice(parameters), trial.chance)
    trial.title = " ".join(words)[:300]
    trial.run(words)
    os.kill(reader, signal.SIGKILL)
    os.waitpid(reader, 0)
    _nothing_left(trial)


def _read_forever(fifo: Path) -> int:
    """Read a pipe in a child; return its process id. A pipe that nobody reads stops any writer."""
    pid = os.fork()
    if not pid:
        # Open for writing, too: it never ends, however many writers come and go.
        descriptor = os.open(fifo, os.O_RDWR)
        while os.read(descriptor, 1 << 16):
            pass
    return pid


def _with_odd_value(
    words: list[str], parameter: CommandParameter, chance: random.Random
) -> list[str]:
    kind = str(parameter.kind)
    if isinstance(parameter.marker, Argument):
        value = chance.choice(PLACES if "Path" in kind else TEXT + PLACES)
        # The first word that is no option and no option's value.
        return [words[0], value, *words[2:]] if chance.random() < 0.8 else [*words, value]
    flag = chance.choice(parameter.flag.split("/"))
    if "bool" in kind:
        return [*words, flag]
    values = WHOLE if "int" in kind else REAL if "float" in kind else TEXT
    if "Path" in kind:
        values = PLACES
    return [*words, f"{flag}={chance.choice(values)}"]


# Helpers of judging --------------------------------------------------------------------------


def _compare(trial: Trial, what: str, found: object, expected: object) -> None:
    if found != expected:
        trial.findings.append(f"{trial.title}: another {what} than without the fault")


def _nothing_left(trial: Trial) -> None:
    # A lock that was not yet whole is removed by the next run once it is two minutes old: till then
    # it may be another verb's.
    begun = f"{RUN}/.lock."
    if left := [name for name in temporary_files(trial.folder) if not name.startswith(begun)]:
        trial.findings.append(f"{trial.title}: left behind {left[:4]}")
    lock = trial.folder / RUN / "lock"
    if lock.exists():
        trial.findings.append(f"{trial.title}: the lock is left")


KINDS: Mapping[str, tuple[Callable[[Trial], None], int]] = {
    "kills": (kill, 40),
    "signals": (signalled, 120),
    "files": (damaged, 2_000),
    "disks": (full_disk, 60),
    "pairs": (pair, 60),
    "options": (odd_options, 3_000),
}
"""Kind → its function, and the trials of a full run."""
assert STEPS > 4, "a run is killed and stopped amid its steps"
