"""manifest.json of a dataset of pairs, format `mpillm.pairs`: its arrays, classes and shards."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np

from mpillm.errors import DataError
from mpillm.system.messages import why
from mpillm.system.plain_files import is_plain_name, read_plain
from mpillm.tokens.chat.chat_template import TEMPLATE, ChatTemplate
from mpillm.tokens.dataset_folder import PAIR_FORMAT
from mpillm.tokens.manifest import SPLITS, Manifest, split_of_json
from mpillm.tokens.manifest_schema import ManifestRules
from mpillm.tokens.pairs.pair_shards import PAIR_KINDS, PairFormat, PairShard

OFFSETS = ("source_offset", "source_ends_offset", "target_offset", "target_ends_offset")
COUNTS = ("nbytes", "n_tokens", "n_docs", "n_source", "n_target", *OFFSETS)
HASHES = ("xxh3_128", "rest_xxh3_128")
SOURCE_DTYPES = {
    "source": ("<u2", "<u4"),
    "frames": ("<f2", "<f4"),
    "pixels": ("|u1", "<f4"),
}
TARGET_DTYPES = {
    "target": ("<u2", "<u4"),
    "label": ("<i4",),
    "labels": ("<i4",),
    "classes": ("<i4",),
    "number": ("<f4",),
    "answer": ("|u1",),
    "supervised": ("|u1",),
    "preferred": ("|u1",),
}
# Dims of a row of each source: a frame has its mels, a picture channels, height and width.
ITEM_DIMS = {"source": 0, "frames": 1, "pixels": 3}
LARGEST_DIM = 1 << 20


class PairRules(ManifestRules):
    """The checks of the manifest of pairs."""

    parts: ClassVar[tuple[str, ...]] = ("tokenizer", "pairs", "prep", "splits")

    def check(self, value: Mapping[str, Any]) -> None:
        # First what the offsets of shards are checked by.
        self._form = self._pairs(value.get("pairs"))
        super().check(value)

    def _pairs(self, value: Any) -> PairFormat:
        names = ("kind", "source_dtype", "target_dtype", "item", "padding", "closed", "classes")
        self._object("pairs", value, names)
        if value["kind"] not in PAIR_KINDS:
            self._fail("pairs.kind", f"one of {', '.join(PAIR_KINDS)}", value["kind"])
        sides = PAIR_KINDS[value["kind"]]
        targets = TARGET_DTYPES[sides.target]
        for name, known in (
            ("source_dtype", SOURCE_DTYPES[sides.source]),
            ("target_dtype", targets),
        ):
            if value[name] not in known:
                self._fail(f"pairs.{name}", " or ".join(known), value[name])
        item, dims = value["item"], ITEM_DIMS[sides.source]
        if not isinstance(item, list) or len(item) != dims:
            self._fail("pairs.item", f"a list of {dims} numbers", item)
        for number in item:
            self._count("pairs.item", number, LARGEST_DIM, least=1)
        self._count("pairs.padding", value["padding"])
        if not isinstance(value["closed"], bool):
            self._fail("pairs.closed", "true or false", value["closed"])
        classes = value["classes"]
        if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
            self._fail("pairs.classes", "a list of texts", classes)
        return form_of_json(value)

    def _shard(self, field: str, value: Any) -> None:
        self._object(field, value, ("file", *COUNTS, *HASHES))
        if not is_plain_name(value["file"]):
            self._fail(f"{field}.file", "a plain file name in the same folder", value["file"])
        for name in COUNTS:
            self._count(f"{field}.{name}", value[name])
        for name in HASHES:
            self._hex(f"{field}.{name}", value[name], 32)
        if value["n_tokens"] != value["n_source"] + value["n_target"]:
            self._fail(f"{field}.n_tokens", "n_source + n_target", value["n_tokens"])
        for name, (dtype, shape, offset) in PairShard(**value).arrays(self._form).items():
            # Python's numbers have no largest: a product of hostile ones is compared as it is.
            nbytes = np.dtype(dtype).itemsize
            for dim in shape:
                nbytes *= dim
            if offset + nbytes > value["nbytes"]:
                whole = f"such that the array is not beyond its end at {value['nbytes']:,} bytes"
                self._fail(f"{field}.{name}_offset", whole, offset)


@dataclass(frozen=True)
class PairManifest(Manifest):
    """A dataset of pairs. In its splits `n_docs` counts pairs, `n_tokens` rows of both sides."""

    FORMAT: ClassVar[str] = PAIR_FORMAT
    RULES: ClassVar[type[ManifestRules]] = PairRules

    pairs: PairFormat

    @property
    def files(self) -> list[str]:
        return [*super().files, *([TEMPLATE] if self.chat else [])]

    @property
    def chat(self) -> Mapping[str, Any]:
        """The sha256 of the chat template, and the special tokens that it may write; {} without."""
        found = self.prep.get("chat", {})
        return found if isinstance(found, Mapping) else {}

    def load_template(self) -> ChatTemplate | None:
        """Load the chat template, comparing its sha256; None without. Raises DataError."""
        if not self.chat:
            return None
        path = self.folder / TEMPLATE
        try:
            data = read_plain(path)
            if hashlib.sha256(data).hexdigest() != self.chat.get("template_sha256"):
                raise ValueError("its sha256 is not that of the manifest")
            return ChatTemplate(data.decode(), self.chat["special_tokens"], str(path))
        except (OSError, ValueError) as failure:
            raise DataError(
                f"{path} is damaged: {why(failure)}; copy it back or prepare the dataset again"
            ) from failure

    @property
    def classes(self) -> tuple[str, ...]:
        return self.pairs.classes

    def _own_facts(self) -> dict[str, Any]:
        return {"pairs": asdict(self.pairs)}

    @classmethod
    def _of_checked(cls, folder: Path, value: Mapping[str, Any]) -> Self:
        splits = {name: split_of_json(value["splits"][name], PairShard) for name in SPLITS}
        form = form_of_json(value["pairs"])
        return cls(folder, value["tokenizer"], value["prep"], splits, form)


def form_of_json(value: Mapping[str, Any]) -> PairFormat:
    """Build the format from its part of a manifest: the lists are tuples."""
    lists = {name: tuple(value[name]) for name in ("item", "classes")}
    return PairFormat(**{**value, **lists})
