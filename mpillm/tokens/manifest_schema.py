"""The rules of manifest.json, checked once at the door: readers trust what passed.

Each rule raises DataError with the file, the field and what was expected.
"""

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import numpy as np

from mpillm.errors import DataError
from mpillm.system.plain_files import is_plain_name

# Positions and sizes are int64 in NumPy and MPI.
LARGEST_COUNT = (1 << 63) - 1
LARGEST_VOCABULARY = 1 << 32
FORMAT_FIELDS = ("format", "version")
SPLITS = ("train", "validation")
TOKENIZER_FIELDS = ("name", "sha256", "vocab_size", "eot_id", "end_of_text")
SPLIT_COUNTS = ("n_tokens", "n_docs", "n_bytes")
SHARD_COUNTS = ("nbytes", "n_tokens", "n_docs", "tokens_offset", "doc_ends_offset")
SHARD_HASHES = ("xxh3_128", "rest_xxh3_128")
SHARD_FIELDS = ("file", "dtype", *SHARD_COUNTS, *SHARD_HASHES)


class ManifestRules:
    """The checks of one manifest; `path` is for messages."""

    parts: ClassVar[tuple[str, ...]] = ("tokenizer", "prep", "splits")

    def __init__(self, path: Path) -> None:
        self.path = path

    def check(self, value: Mapping[str, Any]) -> None:
        """Raise DataError unless the parsed manifest is whole and consistent."""
        self._object("the file", value, (*FORMAT_FIELDS, *self.parts), optional=("digest",))
        if "digest" in value:
            self._hex("digest", value["digest"], 32)
        self._object("prep", value["prep"], (), anything=True)
        self._tokenizer(value["tokenizer"])
        self._object("splits", value["splits"], SPLITS)
        for name in SPLITS:
            self._split(f"splits.{name}", value["splits"][name])
        files = [shard["file"] for split in value["splits"].values() for shard in split["shards"]]
        doubled = sorted(name for name, count in Counter(files).items() if count > 1)
        if doubled:
            self._fail("splits", "a list of each file once", f"{doubled[0]} several times")

    def _tokenizer(self, value: Any) -> None:
        self._object("tokenizer", value, TOKENIZER_FIELDS)
        for name in ("name", "end_of_text"):
            if not isinstance(value[name], str):
                self._fail(f"tokenizer.{name}", "text", value[name])
        self._hex("tokenizer.sha256", value["sha256"], 64)
        self._count("tokenizer.vocab_size", value["vocab_size"], LARGEST_VOCABULARY, least=1)
        self._count("tokenizer.eot_id", value["eot_id"], value["vocab_size"] - 1)

    def _split(self, field: str, value: Any) -> None:
        self._object(field, value, (*SPLIT_COUNTS, "shards"))
        for name in SPLIT_COUNTS:
            self._count(f"{field}.{name}", value[name])
        if not isinstance(value["shards"], list):
            self._fail(f"{field}.shards", "a list", value["shards"])
        for number, shard in enumerate(value["shards"]):
            self._shard(f"{field}.shards[{number}]", shard)
        if len({shard.get("dtype") for shard in value["shards"]}) > 1:
            self._fail(f"{field}.shards", "one dtype", "several")
        for name in ("n_tokens", "n_docs"):
            total = sum(shard[name] for shard in value["shards"])
            if value[name] != total:
                self._fail(f"{field}.{name}", f"{total:,}, the sum of its shards", value[name])

    def _shard(self, field: str, value: Any) -> None:
        self._object(field, value, SHARD_FIELDS)
        if not is_plain_name(value["file"]):
            self._fail(f"{field}.file", "a plain file name in the same folder", value["file"])
        if value["dtype"] not in ("<u2", "<u4"):
            self._fail(f"{field}.dtype", "<u2 or <u4", value["dtype"])
        for name in SHARD_COUNTS:
            self._count(f"{field}.{name}", value[name])
        for name in SHARD_HASHES:
            self._hex(f"{field}.{name}", value[name], 32)
        sizes = {
            "tokens": np.dtype(value["dtype"]).itemsize * value["n_tokens"],
            "doc_ends": 8 * value["n_docs"],
        }
        for name, nbytes in sizes.items():
            end = value[f"{name}_offset"] + nbytes
            if end > value["nbytes"]:
                whole = f"such that the array is not beyond its end at {value['nbytes']:,} bytes"
                self._fail(f"{field}.{name}_offset", whole, value[f"{name}_offset"])
        if value["n_docs"] > value["n_tokens"]:
            most = f"at most one a token, {value['n_tokens']:,}"
            self._fail(f"{field}.n_docs", most, value["n_docs"])

    def _object(
        self,
        field: str,
        value: Any,
        fields: tuple[str, ...],
        optional: tuple[str, ...] = (),
        anything: bool = False,
    ) -> None:
        if not isinstance(value, dict):
            self._fail(field, "an object", value)
        for name in fields:
            if name not in value:
                raise DataError(
                    f"{self.path} lacks a part: {field} has no {name!r}; copy the file back or "
                    "prepare the dataset again"
                )
        unknown = [name for name in value if name not in (*fields, *optional)]
        if unknown and not anything:
            self._fail(field, f"the fields {', '.join(fields)}", unknown[0])

    def _count(self, field: str, value: Any, most: int = LARGEST_COUNT, least: int = 0) -> None:
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            self._fail(field, f"a whole number from {least:,} to {most:,}", value)

    def _hex(self, field: str, value: Any, digits: int) -> None:
        if not isinstance(value, str) or not re.fullmatch(f"[0-9a-f]{{{digits}}}", value):
            self._fail(field, f"{digits} hexadecimal digits", value)

    def _fail(self, field: str, expected: str, found: Any) -> NoReturn:
        shown = f"{found:,}" if isinstance(found, int) else repr(found)
        shown = shown if len(shown) <= 80 else f"{shown[:77]}…"
        raise DataError(
            f"{self.path}: {field} should be {expected}, found {shown}; "
            "copy the file back or prepare the dataset again"
        )
