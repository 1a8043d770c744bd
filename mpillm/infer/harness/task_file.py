"""Read a task of lm-evaluation-harness from its YAML file: the keys that are supported, checked.

Names of keys, defaults and rules are those of lm-eval 0.4.13 (lm_eval/config/task.py). A key that
is not supported is refused by name: without it the figures would be others.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mpillm.errors import UsageError
from mpillm.infer.harness.filters import ResponseFilter, read_filters
from mpillm.infer.harness.harness_metrics import MetricSettings, read_metrics
from mpillm.infer.harness.yaml_file import read_yaml

OUTPUT_TYPES = ("multiple_choice", "loglikelihood", "loglikelihood_rolling", "generate_until")
SAMPLERS = ("default", "first_n")
# Of dataset_path, each with the keys of dataset_kwargs that it takes next to data_files.
FORMATS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"json": ("field",), "csv": ("sep", "delimiter"), "parquet": (), "text": ()}
)
# What the harness itself does not read in an evaluation of local files.
WITHOUT_EFFECT = frozenset(
    {
        "dataset_name",
        "doc_to_decontamination_query",
        "metadata",
        "should_decontaminate",
        "tag",
        "task_alias",
    }
)
TEXTS = (
    "description",
    "doc_to_target",
    "doc_to_text",
    "fewshot_delimiter",
    "gen_prefix",
    "target_delimiter",
)
SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")
KNOWN = frozenset(
    {
        *WITHOUT_EFFECT,
        *TEXTS,
        *SPLITS,
        "dataset_kwargs",
        "dataset_path",
        "doc_to_choice",
        "fewshot_config",
        "filter_list",
        "generation_kwargs",
        "include",
        "metric_list",
        "num_fewshot",
        "output_type",
        "repeats",
        "task",
    }
)
OF_EXAMPLES = ("doc_to_choice", "doc_to_target", "doc_to_text", "gen_prefix")
OF_FEWSHOT = frozenset(
    {*OF_EXAMPLES, "fewshot_delimiter", "sampler", "samples", "split", "target_delimiter"}
)
# The names of the largest number of tokens, the first one that is there counts.
TOKEN_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
OF_GENERATION = frozenset({*TOKEN_NAMES, "do_sample", "temperature", "top_k", "top_p", "until"})
USUAL_GENERATED = 256
DRIVEN = "or let lm-eval itself drive the model: `mpillm lm-eval --help`"


@dataclass(frozen=True)
class DataFiles:
    """The local files of a task. `kind`: of FORMATS; `files`: by split, in the order of rows."""

    kind: str
    files: Mapping[str, tuple[str, ...]]
    field: str = ""
    delimiter: str = ","


@dataclass(frozen=True)
class Wording:
    """How a record becomes a question with its answer: templates, or names of columns."""

    doc_to_text: str
    doc_to_target: Any = None
    doc_to_choice: Any = None
    gen_prefix: str = ""
    target_delimiter: str = " "


@dataclass(frozen=True)
class FewShot:
    """Where the solved examples ahead of a question come from, and how they are written."""

    count: int
    sampler: str
    wording: Wording
    delimiter: str
    split: str = ""
    samples: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class TextSettings:
    """How a text is generated: it ends ahead of the first of `until`, or after `max_tokens`."""

    until: tuple[str, ...] = ()
    max_tokens: int = USUAL_GENERATED
    temperature: float = 0.0
    top_k: int = 50
    top_p: float = 1.0


@dataclass(frozen=True)
class HarnessTask:
    """A task file that was read and checked."""

    name: str
    path: Path
    output_type: str
    data: DataFiles
    splits: Mapping[str, str]
    """The names of splits, by SPLITS; "" where the file names none."""
    wording: Wording
    fewshot: FewShot
    metrics: tuple[MetricSettings, ...]
    filters: tuple[ResponseFilter, ...]
    description: str = ""
    generation: TextSettings = field(default_factory=TextSettings)

    @property
    def evaluated_split(self) -> str:
        return self.splits["test_split"] or self.splits["validation_split"]

    @property
    def fewshot_split(self) -> str:
        """The split of the solved examples; "" where they are in the file itself."""
        if self.fewshot.split or self.fewshot.samples:
            return self.fewshot.split
        named = ("training_split", "validation_split", "test_split")
        return next(self.splits[each] for each in named if self.splits[each])


def read_task(path: Path) -> HarnessTask:
    """Read a task file with the files that it includes. Raises UsageError with the key."""
    table = read_yaml(path)
    keys = _Keys(str(path), table)
    keys.refuse_others(KNOWN, "")
    name, kind = keys.text("task") or path.stem, keys.text("output_type", "generate_until")
    if kind not in OUTPUT_TYPES:
        raise UsageError(
            f"{path}: output_type {kind!r} is not one of {', '.join(OUTPUT_TYPES)}; correct it"
        )
    if keys.number("repeats", 1) != 1:
        raise UsageError(f"{path}: repeats may be 1 alone; leave it out, {DRIVEN}")
    splits = {each: keys.text(each) for each in SPLITS}
    if not (splits["test_split"] or splits["validation_split"]):
        raise UsageError(f"{path}: test_split or validation_split must name a split of the data")
    wording = _wording(keys, kind)
    return HarnessTask(
        name,
        path,
        kind,
        _data_files(keys),
        splits,
        wording,
        _fewshot(keys, wording, splits["fewshot_split"]),
        read_metrics(table.get("metric_list"), kind, str(path)),
        read_filters(table.get("filter_list"), kind, str(path)),
        keys.text("description"),
        _generation(keys, kind),
    )


class _Keys:
    """The keys of a table of the file, read with their types. `place` is for messages."""

    def __init__(self, place: str, table: Mapping[str, Any]) -> None:
        self.place, self.table = place, table

    def refuse_others(self, known: frozenset[str], within: str) -> None:
        """Raise UsageError for a key that is not `known`."""
        for key in self.table:
            if key not in known:
                raise UsageError(
                    f"{self.place}: the key {within}{key} is not supported; known are "
                    f"{', '.join(sorted(known))}. Leave it out if the figures do not need it, "
                    f"{DRIVEN}"
                )

    def inner(self, key: str) -> "_Keys":
        value = self.table.get(key)
        if value is not None and not isinstance(value, dict):
            raise self.wrong(key, value, "a table of keys and values")
        return _Keys(self.place, value or {})

    def text(self, key: str, usual: str = "") -> str:
        value = self.table.get(key)
        if value is None:
            return usual
        if not isinstance(value, str):
            raise self.wrong(key, value, "a text")
        return value

    def number(self, key: str, usual: float, least: float = 0) -> float:
        value = self.table.get(key, usual)
        if value is None:
            return usual
        if isinstance(value, bool) or not isinstance(value, int | float) or value < least:
            raise self.wrong(key, value, f"a number from {least:g}")
        return value

    def wrong(self, key: str, value: Any, wanted: str) -> UsageError:
        return UsageError(
            f"{self.place}: {key} must be {wanted}, and not {value!r:.80}; correct it"
        )


def _wording(keys: _Keys, kind: str) -> Wording:
    for key in ("doc_to_text", "doc_to_target"):
        if keys.table.get(key) is None:
            raise UsageError(f"{keys.place}: the key {key} is missing; name a column or a template")
    target = keys.table["doc_to_target"]
    if not isinstance(target, str | int | list):
        raise keys.wrong("doc_to_target", target, "a column, a template, a number or a list")
    choices = keys.table.get("doc_to_choice")
    if kind == "multiple_choice" and choices is None:
        raise UsageError(
            f"{keys.place}: output_type multiple_choice needs doc_to_choice: a column, a template "
            "or a list of texts"
        )
    if not isinstance(choices, str | list | dict | None):
        raise keys.wrong("doc_to_choice", choices, "a column, a template, a list or a table")
    return Wording(
        keys.text("doc_to_text"),
        target,
        choices,
        keys.text("gen_prefix"),
        keys.text("target_delimiter", " "),
    )


def _data_files(keys: _Keys) -> DataFiles:
    kind = keys.text("dataset_path")
    if kind not in FORMATS:
        raise UsageError(
            f"{keys.place}: dataset_path {kind!r} is not one of {', '.join(FORMATS)}, of local "
            "files; save the dataset as such files, and name them in dataset_kwargs.data_files"
        )
    own = keys.inner("dataset_kwargs")
    own.refuse_others(frozenset({"data_files", *FORMATS[kind]}), "dataset_kwargs.")
    named = own.table.get("data_files")
    # Without names of splits all files are those of one, as the library datasets has it.
    by_split = named if isinstance(named, dict) else {"train": named}
    files: dict[str, tuple[str, ...]] = {}
    for split, value in by_split.items():
        listed = value if isinstance(value, list) else [value]
        if not listed or not all(isinstance(each, str) and each for each in listed):
            raise own.wrong("dataset_kwargs.data_files", named, "a file, a list, or files by split")
        files[str(split)] = tuple(map(str, listed))
    return DataFiles(
        kind, files, own.text("field"), own.text("sep") or own.text("delimiter") or ","
    )


def _fewshot(keys: _Keys, whole: Wording, split: str) -> FewShot:
    own = keys.inner("fewshot_config")
    own.refuse_others(OF_FEWSHOT, "fewshot_config.")
    sampler = own.text("sampler", "default")
    if sampler not in SAMPLERS:
        raise UsageError(
            f"{keys.place}: fewshot_config.sampler {sampler!r} is not one of {', '.join(SAMPLERS)}"
        )
    samples = own.table.get("samples") or []
    if not isinstance(samples, list) or not all(isinstance(each, dict) for each in samples):
        raise own.wrong("fewshot_config.samples", samples, "a list of records")
    given = {key: own.table[key] for key in OF_EXAMPLES if own.table.get(key) is not None}
    wording = Wording(
        given.get("doc_to_text", whole.doc_to_text),
        given.get("doc_to_target", whole.doc_to_target),
        given.get("doc_to_choice", whole.doc_to_choice),
        own.text("gen_prefix", whole.gen_prefix),
        own.text("target_delimiter", whole.target_delimiter),
    )
    delimiter = own.text("fewshot_delimiter", keys.text("fewshot_delimiter", "\n\n"))
    count = keys.number("num_fewshot", 0)
    if count != int(count):
        raise keys.wrong("num_fewshot", count, "a whole number")
    split = own.text("split", split)
    return FewShot(int(count), sampler, wording, delimiter, split, () if split else tuple(samples))


def _generation(keys: _Keys, kind: str) -> TextSettings:
    if kind != "generate_until":
        if keys.table.get("generation_kwargs") is not None:
            raise UsageError(
                f"{keys.place}: generation_kwargs is of output_type generate_until; leave it out"
            )
        return TextSettings()
    usual = keys.text("fewshot_delimiter", "\n\n")
    return text_settings(keys.inner("generation_kwargs").table, keys.place, (usual,))


def text_settings(
    table: Mapping[str, Any], place: str, usual_until: tuple[str, ...]
) -> TextSettings:
    """Read the table generation_kwargs. Raises UsageError for a key that is not supported."""
    own = _Keys(place, table)
    own.refuse_others(OF_GENERATION, "generation_kwargs.")
    most = next((own.number(each, 0, 1) for each in TOKEN_NAMES if own.table.get(each)), 0)
    return TextSettings(
        _until(own, usual_until),
        int(most) or USUAL_GENERATED,
        _temperature(own),
        int(own.number("top_k", 50)),
        float(own.number("top_p", 1.0)),
    )


def _until(own: _Keys, usual: tuple[str, ...]) -> tuple[str, ...]:
    until = own.table.get("until", list(usual))
    listed: list[Any] = until if isinstance(until, list) else [until]
    if not all(isinstance(each, str) for each in listed):
        raise own.wrong("generation_kwargs.until", until, "a text or a list of texts")
    return tuple(each for each in listed if each)


def _temperature(own: _Keys) -> float:
    """Return the temperature by which tokens are drawn; 0: the likeliest is taken."""
    drawn, temperature = own.table.get("do_sample"), float(own.number("temperature", 0.0))
    if not isinstance(drawn, bool | None):
        raise own.wrong("generation_kwargs.do_sample", drawn, "true or false")
    if drawn and not temperature:
        raise UsageError(
            f"{own.place}: generation_kwargs.do_sample is true and its temperature 0; "
            "give a temperature above 0, or leave do_sample out"
        )
    return 0.0 if drawn is False else temperature
