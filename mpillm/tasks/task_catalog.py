"""The table of tasks by name.

A recipe names one by `task.name`; a plug-in is named as `package.module:Name`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge, Gt, Le, Lt

from mpillm.errors import MismatchError, RecipeError
from mpillm.system.json_text import to_json
from mpillm.system.plugins import is_plugin, load_class
from mpillm.tasks.answer_rewards import reward_catalog
from mpillm.tasks.vocabulary import Lengths, Vocabulary

if TYPE_CHECKING:
    from mpillm.tasks.task import Task

TASKS: Mapping[str, str] = MappingProxyType(
    {
        "causal-lm": "mpillm.tasks.causal_lm:CausalLM",
        "chat": "mpillm.tasks.chat:Chat",
        "dpo": "mpillm.tasks.preferences.dpo:DPO",
        "kto": "mpillm.tasks.preferences.kto:KTO",
        "grpo": "mpillm.tasks.grpo:GRPO",
        "masked-lm": "mpillm.tasks.masked_lm:MaskedLM",
        "span-corruption": "mpillm.tasks.span_corruption:SpanCorruption",
        "seq2seq": "mpillm.tasks.seq2seq:SequenceToSequence",
        "sequence-classification": "mpillm.tasks.sequence_classification:SequenceClassification",
        "multi-label-classification": (
            "mpillm.tasks.multi_label_classification:MultiLabelClassification"
        ),
        "question-answering": "mpillm.tasks.question_answering:QuestionAnswering",
        "regression": "mpillm.tasks.text_regression:Regression",
        "token-classification": "mpillm.tasks.token_classification:TokenClassification",
        "image-classification": "mpillm.tasks.image_classification:ImageClassification",
        "ctc": "mpillm.tasks.ctc:CTC",
    }
)
DEFAULT = "causal-lm"
READERS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "mask_token": ("masked-lm",),
        "masked_share": ("masked-lm", "span-corruption"),
        "span_length": ("span-corruption",),
        "start_token": ("seq2seq", "span-corruption"),
        "beta": ("dpo", "kto"),
        "desirable_weight": ("kto",),
        "undesirable_weight": ("kto",),
        **dict.fromkeys(("rewards", "reward_weights", "reward_pattern", "group"), ("grpo",)),
        **dict.fromkeys(("answer_tokens", "temperature", "top_p"), ("grpo",)),
        **dict.fromkeys(("kl", "clip", "updates"), ("grpo",)),
    }
)
"""Which tasks of the table read a setting that not all read. A plug-in may read any."""


@dataclass(frozen=True)
class TaskSettings:
    """The task: fields, targets and loss of a batch."""

    name: str = DEFAULT
    """A task of the catalogue, or a plug-in as `package.module:Name`."""
    label_smoothing: Annotated[float, Ge(0), Lt(1)] = 0.0
    """The share of a target's probability that all tokens share, or of DPO's pairs that are taken
    as labelled wrongly; in training only.
    """
    z_loss: Annotated[float, Ge(0), Lt(1)] = 0.0
    """The factor of log² Z in the loss of training, such as 1e-4."""
    mask_token: str = ""
    """The token of the tokenizer that hides others, such as [MASK]; empty: one that is added."""
    masked_share: Annotated[float, Gt(0), Lt(1)] = 0.15
    """The share of tokens that masked LM and span corruption hide."""
    span_length: Annotated[float, Ge(1)] = 3.0
    """The mean length of a hidden span, in tokens."""
    start_token: str = ""
    """The decoder's first token; empty: the padding token, or the end of text without one."""

    beta: Annotated[float, Gt(0)] = 0.1
    """How closely DPO and KTO keep to the weights at the start: the factor of log-ratios."""

    desirable_weight: Annotated[float, Gt(0)] = 1.0
    """The weight of desirable answers in the loss of KTO."""
    undesirable_weight: Annotated[float, Gt(0)] = 1.0
    """The weight of the other answers."""

    rewards: tuple[str, ...] = reward_catalog.DEFAULT
    """By what GRPO rewards an answer: exact, number, pattern, or your own as package.module:Name;
    it earns their sum.
    """
    reward_weights: tuple[float, ...] = ()
    """A weight of each reward; empty: 1."""
    reward_pattern: str = ""
    """The regular expression that the reward `pattern` matches with a whole answer."""
    group: Annotated[int, Ge(2)] = 8
    """How many answers to a prompt are compared with each other; it divides train.batch."""
    answer_tokens: Annotated[int, Gt(0)] = 64
    """The most tokens of an answer that the model writes."""
    temperature: Annotated[float, Ge(0.01), Le(100)] = 1.0
    """Of the answers that the model learns from; those of an evaluation are greedy."""
    top_p: Annotated[float, Gt(0), Le(1)] = 1.0
    """The share of the probability from which their tokens are drawn (nucleus sampling)."""
    kl: Annotated[float, Ge(0)] = 0.04
    """The factor of the divergence from the weights at the start; 0: they are not kept."""
    clip: Annotated[float, Gt(0), Lt(1)] = 0.2
    """How far the probability of a token may move by the later updates of a step."""
    updates: Annotated[int, Gt(0)] = 1
    """How often each step updates the weights by the same answers."""

    @property
    def terms(self) -> dict[str, float]:
        """The terms that change the loss of training, without those of 0."""
        terms = {"label_smoothing": self.label_smoothing, "z_loss": self.z_loss}
        return {name: value for name, value in terms.items() if value}

    def __post_init__(self) -> None:
        check_task(self.name)
        reward_catalog.check_rewards(self.rewards, self.reward_weights)


def check_read(settings: TaskSettings) -> None:
    """Raise RecipeError where a setting has a value that the task does not read."""
    if settings.name not in TASKS:
        return
    for each in fields(settings):
        value, readers = getattr(settings, each.name), READERS.get(each.name)
        if readers and settings.name not in readers and value != each.default:
            raise RecipeError(
                f"task.{each.name} = {to_json(value)} is a setting of {' and '.join(readers)}, and "
                f"the task is {settings.name}; leave it out, or name another task"
            )


def check_task(name: str) -> None:
    """Raise RecipeError unless `name` may be a task."""
    # Nothing is imported: a task imports torch, which a login node may not have.
    if name not in TASKS and not is_plugin(name):
        raise RecipeError(
            f"task.name = {name!r} is unknown; tasks: {', '.join(TASKS)}, "
            "or a plug-in as package.module:Name"
        )


def task_class(name: str) -> type["Task"]:
    """Return the class of the task called `name`; imports torch. Raises UsageError."""
    from mpillm.tasks.task import Task

    return load_class(name, TASKS, "task", Task)  # type: ignore[type-abstract]


def make_task(
    name: str,
    settings: TaskSettings | None = None,
    vocabulary: Vocabulary | None = None,
    lengths: Lengths | None = None,
) -> "Task":
    """Make the task called `name`; imports torch. Raises UsageError for an unknown name.

    `settings`: None for the defaults. `vocabulary`: of the data or of a trained model's tokenizer;
    `lengths`: of the model. Raises RecipeError where the task has no cross-entropy for its terms.
    """
    kind = task_class(name)
    settings = settings or TaskSettings(name)
    others = {key: value for key, value in settings.terms.items() if key not in kind.terms}
    if others:
        named = " and ".join(f"task.{key} = {value:g}" for key, value in others.items())
        raise RecipeError(
            f"{named} changes a cross-entropy, and the task {name} has none of mpillm's; leave it "
            "out, or derive the task from CrossEntropyTask"
        )
    vocabulary = vocabulary or Vocabulary(0)
    task = kind.make(settings, vocabulary, lengths or Lengths())
    task.classes = vocabulary.classes
    return task


def problem_type_of(name: str) -> str:
    """Return what transformers calls the problem of a task; "" where it has no word for it.

    Imports torch. A name that is no task has none.
    """
    return task_class(name).problem_type if name in TASKS or is_plugin(name) else ""


def read_settings(section: Mapping[str, Any]) -> TaskSettings:
    """Build the settings from the section [task] of a checkpoint's recipe.

    Earlier releases wrote fewer keys. Raises MismatchError for keys that this mpillm lacks.
    """
    unknown = sorted(set(section) - {each.name for each in fields(TaskSettings)})
    if unknown:
        raise MismatchError(
            "the model was trained with settings of the task that this mpillm does not know: "
            f"{', '.join(unknown)}; use the release that it was made with"
        )
    return TaskSettings(**section)
