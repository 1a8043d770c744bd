"""manifest.json: the description of a dataset, written last. A reader needs nothing else."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Self, TypeVar

from mpillm.errors import DataError, MismatchError
from mpillm.system import hdf5
from mpillm.system.atomic import write_text
from mpillm.system.json_text import read_json, to_json
from mpillm.system.messages import command, why
from mpillm.system.plain_files import LARGEST_FILE, read_plain
from mpillm.tokens.dataset_folder import FORMAT, MANIFEST, PAIR_FORMAT
from mpillm.tokens.manifest_schema import SPLITS as SPLITS
from mpillm.tokens.manifest_schema import ManifestRules
from mpillm.tokens.shards import VERSION, ShardFile, ShardInfo
from mpillm.tokens.tokenizer import Tokenizer

if TYPE_CHECKING:
    from mpillm.tokens.chat.chat_template import ChatTemplate

NAME = MANIFEST
TOKENIZER = "tokenizer.json"
# The key of a manifest that names files while they are replaced: see publish.py.
UNFINISHED = "unfinished"
# The facts of a dataset of bare numbers, without a text: any id of two bytes.
NO_TOKENIZER: Mapping[str, Any] = {
    "name": "none",
    "sha256": "0" * 64,
    "vocab_size": 1 << 16,
    "eot_id": 0,
    "end_of_text": "",
}


Shard = TypeVar("Shard", bound=ShardFile)


@dataclass(frozen=True)
class Split(Generic[Shard]):
    """A split's totals and shards; `n_bytes` counts the UTF-8 bytes of its texts."""

    n_tokens: int
    n_docs: int
    n_bytes: int
    shards: tuple[Shard, ...]

    @classmethod
    def of(cls, n_bytes: int, shards: Sequence[Shard]) -> Self:
        """Sum the totals of the shards."""
        n_tokens, n_docs = (
            sum(getattr(s, name) for s in shards) for name in ("n_tokens", "n_docs")
        )
        return cls(n_tokens, n_docs, n_bytes, tuple(shards))

    def to_json(self) -> dict[str, Any]:
        shards = [shard.to_json() for shard in self.shards]
        return {
            "n_tokens": self.n_tokens,
            "n_docs": self.n_docs,
            "n_bytes": self.n_bytes,
            "shards": shards,
        }


@dataclass(frozen=True)
class Manifest:
    """A dataset: its tokenizer (name, sha256, vocab_size, eot_id, end_of_text), the options that
    it was prepared with (`prep`), and its splits.
    """

    folder: Path
    tokenizer: Mapping[str, Any]
    prep: Mapping[str, Any]
    splits: Mapping[str, Split[Any]]

    # The schema of the file, and its rules; another kind of dataset has its own.
    FORMAT: ClassVar[str] = FORMAT
    RULES: ClassVar[type[ManifestRules]] = ManifestRules

    @property
    def vocab_size(self) -> int:
        return int(self.tokenizer["vocab_size"])

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of a classification's labels; tokens have none."""
        return ()

    @property
    def eot_id(self) -> int:
        return int(self.tokenizer["eot_id"])

    @cached_property
    def manifest_hash(self) -> str:
        """The dataset's identity: xxh3-128 of the manifest's text without its own digest."""
        return hdf5.digest(self._text({}).encode())

    @property
    def files(self) -> list[str]:
        """The names of all files of the dataset."""
        shards = [shard.file for split in self.splits.values() for shard in split.shards]
        return [NAME, TOKENIZER, *shards]

    def text(self) -> str:
        """Write the file's text; its `digest` is the manifest's hash."""
        return self._text({"digest": self.manifest_hash})

    def _text(self, last: Mapping[str, str]) -> str:
        splits = {name: split.to_json() for name, split in self.splits.items()}
        head = {"format": self.FORMAT, "version": VERSION, "tokenizer": dict(self.tokenizer)}
        body = {**self._own_facts(), "prep": dict(self.prep), "splits": splits}
        return to_json({**head, **body, **last}, indent=1) + "\n"

    def _own_facts(self) -> dict[str, Any]:
        """Return the parts of the file that other kinds of datasets lack."""
        return {}

    def save(self) -> None:
        write_text(self.folder / NAME, self.text())

    @classmethod
    def load(cls, folder: str | Path) -> "Manifest":
        """Read a dataset's manifest, but no shard (`check_shards` does). Raises DataError.

        That of pairs is a `PairManifest`.
        """
        # Imported here: that class derives from this one.
        from mpillm.tokens.pairs.pair_manifest import PairManifest

        folder = Path(folder)
        path = folder / NAME
        try:
            value = read_json(path)
        except (FileNotFoundError, NotADirectoryError) as failure:
            raise DataError(
                f"{folder} is not a prepared dataset: it has no {NAME}; "
                f"make one with `mpillm prepare SOURCE {command(['--out', folder])}`"
            ) from failure
        except (OSError, ValueError) as failure:
            raise DataError(
                f"cannot read {path}: {why(failure)}; "
                "copy the file back or prepare the dataset again"
            ) from failure
        pairs = isinstance(value, dict) and value.get("format") == PAIR_FORMAT
        kind = PairManifest if pairs else Manifest
        return kind._from_json(folder, path, value)

    @classmethod
    def _from_json(cls, folder: Path, path: Path, value: Any) -> "Manifest":
        kind = (
            (value.get("format"), value.get("version")) if isinstance(value, dict) else (None, None)
        )
        if kind != (cls.FORMAT, VERSION):
            raise DataError(
                f"{path} should be format {cls.FORMAT} version {VERSION}, "
                f"found format {kind[0]} version {kind[1]}; "
                "prepare the dataset with this mpillm, or use the one that made it"
            )
        if UNFINISHED in value:
            raise DataError(
                f"{folder} was being replaced when its job ended; prepare it again with --overwrite"
            )
        cls.RULES(path).check(value)
        made = cls._of_checked(folder, value)
        # Earlier versions wrote no digest.
        if value.get("digest", made.manifest_hash) != made.manifest_hash:
            raise DataError(
                f"{path} is damaged: its digest is {value['digest']}, that of its contents "
                f"{made.manifest_hash}; copy the file back or prepare the dataset again"
            )
        return made

    @classmethod
    def _of_checked(cls, folder: Path, value: Mapping[str, Any]) -> Self:
        """Build the manifest from a parsed file that has passed its rules."""
        splits = {name: split_of_json(value["splits"][name], ShardInfo) for name in SPLITS}
        return cls(folder, value["tokenizer"], value["prep"], splits)

    def split(self, name: str) -> Split[Any]:
        """Return the split of that name. Raises DataError when it has no tokens."""
        split = self.splits.get(name)
        if split is None or not split.n_tokens:
            full = ", ".join(key for key, value in self.splits.items() if value.n_tokens)
            hint = "; prepare it with a --validation above 0" if name == "validation" else ""
            raise DataError(f"the dataset {self.folder} has no {name} split (it has {full}){hint}")
        return split

    def check_shards(self, name: str) -> None:
        """Check that each shard of the split exists and has its size. Raises DataError."""
        for shard in self.split(name).shards:
            check_shard(self.folder / shard.file, shard)

    def load_template(self) -> "ChatTemplate | None":
        """Load the dataset's chat template; None where it has none. Raises DataError."""
        return None

    def load_tokenizer(self) -> Tokenizer:
        """Load the dataset's own tokenizer, comparing its sha256.

        Raises DataError where the file is missing or damaged, and MismatchError when it is another
        tokenizer.
        """
        path = self.folder / TOKENIZER
        if not path.is_file():
            raise DataError(
                f"the dataset {self.folder} lacks its tokenizer.json; copy it back or prepare again"
            )
        try:
            data = read_plain(path, most=LARGEST_FILE)
            found = Tokenizer.from_json(
                data.decode(), self.tokenizer["name"], self.tokenizer["end_of_text"]
            )
        except (OSError, UnicodeDecodeError, DataError) as failure:
            # With the right hash, it is this library that cannot read the file.
            if isinstance(failure, DataError) and _sha256(data) == self.tokenizer["sha256"]:
                raise DataError(f"{path}: {failure}") from failure
            raise DataError(
                f"{path} is damaged: {why(failure)}; copy it back or prepare the dataset again"
            ) from failure
        check_tokenizer(self, found)
        for name in ("vocab_size", "eot_id"):
            if getattr(found, name) != self.tokenizer[name]:
                raise MismatchError(
                    f"{self.folder / NAME}: tokenizer.{name} is {self.tokenizer[name]:,}, that of "
                    f"{path} {getattr(found, name):,}; copy both files back or prepare the dataset "
                    "again"
                )
        return found


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def check_shard(path: Path, shard: ShardFile) -> None:
    try:
        nbytes = path.stat().st_size
    except OSError as failure:
        raise DataError(
            f"the manifest lists {path}, but: {failure.strerror}; "
            "copy the file back or prepare the dataset again"
        ) from failure
    if nbytes != shard.nbytes:
        what = "cut short" if nbytes < shard.nbytes else "not the file that was written"
        raise DataError(
            f"{path} is {what}: expected {shard.nbytes:,} bytes, found {nbytes:,}; "
            "copy it again or prepare the dataset again"
        )


def check_tokenizer(manifest: Manifest, tokenizer: Tokenizer) -> None:
    """Raise MismatchError unless the dataset was made with `tokenizer`."""
    expected: str = manifest.tokenizer["sha256"]
    if tokenizer.sha256 != expected:
        raise MismatchError(
            f"the dataset {manifest.folder} was made with the tokenizer "
            f"{manifest.tokenizer['name']} (sha256 {expected[:12]}, "
            f"{manifest.vocab_size:,} tokens), not with {tokenizer.name} "
            f"(sha256 {tokenizer.sha256[:12]}, {tokenizer.vocab_size:,} tokens); "
            "take the tokenizer.json next to the shards, or prepare the text again"
        )


def tokenizer_facts(tokenizer: Tokenizer) -> dict[str, Any]:
    """Describe a tokenizer for the manifest."""
    return {
        "name": tokenizer.name,
        "sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "eot_id": tokenizer.eot_id,
        "end_of_text": tokenizer.end_of_text,
    }


def split_of_json(value: Mapping[str, Any], kind: type[Shard]) -> Split[Shard]:
    """Build a split, whose shards are of `kind`, from its part of a manifest."""
    shards = tuple(kind(**shard) for shard in value["shards"])
    return Split(value["n_tokens"], value["n_docs"], value["n_bytes"], shards)
