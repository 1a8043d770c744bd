"""manifest.json: the description of a dataset, written last. A reader needs nothing else."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mpillm.errors import DataError, MismatchError
from mpillm.system import hdf5
from mpillm.system.atomic import write_text
from mpillm.tokens.shards import FORMAT, VERSION, ShardInfo
from mpillm.tokens.tokenizer import Tokenizer

NAME = "manifest.json"
SPLITS = ("train", "validation")


@dataclass(frozen=True)
class Split:
    """A split's totals and shards; `n_bytes` counts the UTF-8 bytes of its texts."""

    n_tokens: int
    n_docs: int
    n_bytes: int
    shards: tuple[ShardInfo, ...]

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
    splits: Mapping[str, Split]

    @property
    def vocab_size(self) -> int:
        return int(self.tokenizer["vocab_size"])

    @property
    def eot_id(self) -> int:
        return int(self.tokenizer["eot_id"])

    @cached_property
    def manifest_hash(self) -> str:
        """The dataset's identity: xxh3-128 of the manifest's bytes, with the hash of each shard."""
        return hdf5.digest(self.text().encode())

    def text(self) -> str:
        splits = {name: split.to_json() for name, split in self.splits.items()}
        head = {
            "format": FORMAT,
            "version": VERSION,
            "tokenizer": dict(self.tokenizer),
            "prep": dict(self.prep),
        }
        value = {**head, "splits": splits}
        return json.dumps(value, indent=1, ensure_ascii=False) + "\n"

    def save(self) -> None:
        write_text(self.folder / NAME, self.text())

    @classmethod
    def load(cls, folder: str | Path) -> "Manifest":
        """Read a dataset's manifest, but no shard (`check_shards` does). Raises DataError."""
        folder = Path(folder)
        path = folder / NAME
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as failure:
            raise DataError(
                f"{folder} is not a prepared dataset: it has no {NAME}; "
                f"make one with `mpillm prepare SOURCE --out {folder}`"
            ) from failure
        except (OSError, ValueError) as failure:
            raise DataError(
                f"cannot read {path}: {failure}; prepare the dataset again"
            ) from failure
        return cls._from_json(folder, path, value)

    @classmethod
    def _from_json(cls, folder: Path, path: Path, value: Any) -> "Manifest":
        kind = (
            (value.get("format"), value.get("version")) if isinstance(value, dict) else (None, None)
        )
        if kind != (FORMAT, VERSION):
            raise DataError(
                f"{path} should be format {FORMAT} version {VERSION}, "
                f"found format {kind[0]} version {kind[1]}; "
                "prepare the dataset with this mpillm, or use the one that made it"
            )
        try:
            splits = {name: _split(value["splits"][name]) for name in SPLITS}
            return cls(folder, value["tokenizer"], value["prep"], splits)
        except (KeyError, TypeError, AttributeError) as failure:
            raise DataError(
                f"{path} lacks a part: {failure}; prepare the dataset again"
            ) from failure

    def split(self, name: str) -> Split:
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

    def load_tokenizer(self) -> Tokenizer:
        """Load the dataset's own tokenizer.

        Raises DataError, and MismatchError when the file is another tokenizer.
        """
        path = self.folder / "tokenizer.json"
        if not path.is_file():
            raise DataError(
                f"the dataset {self.folder} lacks its tokenizer.json; copy it back or prepare again"
            )
        found = Tokenizer.load(path, self.tokenizer["end_of_text"], self.tokenizer["name"])
        check_tokenizer(self, found)
        return found


def check_shard(path: Path, shard: ShardInfo) -> None:
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
    if (
        shard.tokens_offset + shard.tokens_nbytes > nbytes
        or shard.doc_ends_offset + 8 * shard.n_docs > nbytes
    ):
        raise DataError(
            f"the manifest puts arrays of {path} beyond its end at {nbytes:,} bytes; "
            "prepare the dataset again"
        )


def check_tokenizer(manifest: Manifest, tokenizer: Tokenizer) -> None:
    """Raise MismatchError unless the dataset was made with `tokenizer`."""
    expected = manifest.tokenizer["sha256"]
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


def _split(value: Mapping[str, Any]) -> Split:
    shards = tuple(ShardInfo(**shard) for shard in value["shards"])
    return Split(value["n_tokens"], value["n_docs"], value["n_bytes"], shards)
