"""`mpillm evaluate`."""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from mpillm.errors import UsageError
from mpillm.infer.sampling import Decoding, Sampling
from mpillm.system.command_line import Argument, Debug, Json, Option
from mpillm.system.extras import require_packages
from mpillm.verbs.job import Job, limit_torch_threads, open_job

Trained = Annotated[
    Path, Argument("A run's folder, or one of its checkpoints.", metavar="RUN|CHECKPOINT")
]


# The options of texts that a model writes.
WRITING = (
    "max_tokens",
    "beams",
    "length_penalty",
    "temperature",
    "top_k",
    "top_p",
    "seed",
    "outputs",
)
# What has no meaning next to task files of lm-evaluation-harness, which say how texts are written.
NOT_OF_HARNESS = (
    *(name for name in WRITING if name != "outputs"),
    "baselines",
    "calibrate",
    "data",
    "generate",
    "metrics",
    "plot",
)
# What has no meaning next to a retrieval set, which has texts of its own.
NOT_OF_RETRIEVAL = (
    *(name for name in NOT_OF_HARNESS if name != "metrics"),
    "harness",
    "limit",
)
PICTURES = (".png", ".svg", ".pdf")
OF_RETRIEVAL = ("split", "pooling")

Device = Annotated[
    Literal["auto", "cpu", "cuda"],
    Option("Where to compute; auto: on a GPU a rank, where all ranks see one."),
]


@dataclass(frozen=True)
class Evaluate:
    """Evaluate a model on all validation data: loss, perplexity, bits per byte, other metrics.

    With --generate: the texts that it writes for pairs, by BLEU, ROUGE, exact match and others.
    With --harness tasks/sums.yaml: the figures of lm-evaluation-harness for this task file.
    With --retrieval beir/scifact: how well an encoder's embeddings find documents.
    """

    example: ClassVar = (
        "mpirun -n 2 mpillm evaluate runs/translation --generate --beams 4 --metrics bleu,chrf"
    )

    trained: Trained
    other: Annotated[
        Path | None,
        Argument("Compare it with another one on the same data.", metavar="OTHER"),
    ] = None
    data: Annotated[Path | None, Option("Another prepared folder than the run's own.")] = None
    baselines: Annotated[bool, Option("Score simple models too.")] = False
    metrics: Annotated[
        tuple[str, ...],
        Option(
            "Metrics, also your own as package.module:Name; else the task's.",
            metavar="A,B,…",
            commas=True,
        ),
    ] = ()
    calibrate: Annotated[
        bool,
        Option("Fit a classifier's temperature on half of the rows; test it on the others."),
    ] = False
    plot: Annotated[
        Path | None,
        Option(
            "Draw a classifier's reliability and confusions: a file in .png, .svg or .pdf.",
            metavar="FILE.png",
        ),
    ] = None
    generate: Annotated[
        bool, Option("Write the answer to each validation pair, and compare it with the reference.")
    ] = False
    max_tokens: Annotated[
        int | None, Option("With --generate: of a text; else 256, or what the context allows.")
    ] = None
    beams: Annotated[int, Option("With --generate: beam search with so many; 1: none.")] = 1
    length_penalty: Annotated[
        float, Option("With --beams: scores are divided by length ^ this; above 1: longer texts.")
    ] = 1.0
    temperature: Annotated[float, Option("With --generate: as of `generate`; 0: greedy.")] = 0.0
    top_k: Annotated[int, Option("With --temperature: as of `generate`.")] = 50
    top_p: Annotated[float, Option("With --temperature: as of `generate`.")] = 1.0
    seed: Annotated[int, Option("With --temperature: the same seed gives the same texts.")] = 0
    outputs: Annotated[
        Path | None,
        Option("A new file of JSON lines: all texts, or with --retrieval the documents found."),
    ] = None
    harness: Annotated[
        tuple[Path, ...],
        Option(
            "A task file of lm-evaluation-harness over local data; once for each file.",
            metavar="FILE.yaml",
        ),
    ] = ()
    limit: Annotated[
        int | None, Option("With --harness: the first so many examples of a file.", minimum=1)
    ] = None
    retrieval: Annotated[
        Path | None,
        Option("A folder of BEIR's layout: corpus.jsonl, queries.jsonl and qrels/SPLIT.tsv."),
    ] = None
    split: Annotated[str, Option("With --retrieval: the relevances of qrels/ to take.")] = "test"
    pooling: Annotated[
        Literal["mean", "first", "last"],
        Option("With --retrieval: the hidden states that make a text's embedding."),
    ] = "mean"
    device: Device = "auto"
    as_json: Json = False
    debug: Debug = False

    def __post_init__(self) -> None:
        self._decoding()
        self._check_plot()
        if self.retrieval:
            self._refuse(NOT_OF_RETRIEVAL, "not of --retrieval, which embeds the texts of a folder")
            return
        self._refuse(OF_RETRIEVAL, "of --retrieval", "name a folder of texts, or leave it out")
        if self.harness:
            self._refuse(NOT_OF_HARNESS, "of prepared data, and --harness of task files")
            return
        if self.limit is not None:
            raise UsageError("--limit is of --harness; give a task file, or leave it out")
        if self.generate:
            self._refuse(("baselines", "calibrate", "plot"), "of losses, and --generate of texts")
            return
        for each in fields(self):
            if each.name in WRITING and getattr(self, each.name) != each.default:
                raise UsageError(
                    f"--{each.name.replace('_', '-')} is for texts that the model writes; give "
                    "--generate, too, or leave it out"
                )

    def _check_plot(self) -> None:
        """Raise UsageError for a picture in an unknown format."""
        if self.plot is not None and self.plot.suffix.lower() not in PICTURES:
            raise UsageError(
                f"--plot draws a PNG, SVG or PDF; end the name {self.plot} in {', '.join(PICTURES)}"
            )

    def _refuse(
        self, names: Sequence[str], why: str, remedy: str = "ask for one at a time"
    ) -> None:
        """Raise UsageError for an option of `names` that was given."""
        for each in fields(self):
            if each.name in names and getattr(self, each.name) != each.default:
                option = each.name.replace("_", "-")
                raise UsageError(f"--{option} is {why}; {remedy}")

    def _decoding(self) -> Decoding:
        most = 1 if self.max_tokens is None else self.max_tokens
        sampling = Sampling(most, self.temperature, self.top_k, self.top_p, self.seed)
        return Decoding(sampling, self.max_tokens, self.beams, self.length_penalty)

    def run(self) -> None:
        with open_job(self.debug) as job:
            require_packages("mpillm evaluate", "torch")
            limit_torch_threads(job.threads)
            if self.retrieval:
                self._print_retrieval(job, self.retrieval)
                return
            if self.harness:
                self._print_harness(job)
                return
            if self.generate:
                self._print_answers(job)
                return
            if self.plot is not None:
                require_packages("evaluate --plot", "matplotlib")
            from mpillm.infer.print_evaluation import ClassifierOptions, print_evaluation

            print_evaluation(
                self.trained,
                self.data,
                self.baselines,
                self.as_json,
                job.comm,
                job.console,
                self.metrics,
                self.device,
                self.other,
                ClassifierOptions(self.calibrate, self.plot),
            )

    @property
    def _models(self) -> list[Path]:
        return [self.trained, self.other] if self.other else [self.trained]

    def _print_retrieval(self, job: Job, folder: Path) -> None:
        from mpillm.infer.scores.print_retrieval import RetrievalOptions, print_retrieval

        given = self.split, self.metrics, self.pooling, self.outputs, self.as_json
        options = RetrievalOptions(*given)
        print_retrieval(self._models, folder, options, job.comm, job.console, self.device)

    def _print_harness(self, job: Job) -> None:
        from mpillm.infer.harness.print_harness import HarnessOptions, print_harness

        options = HarnessOptions(self.harness, self.limit, self.outputs, self.as_json)
        print_harness(self._models, options, job.comm, job.console, self.device)

    def _print_answers(self, job: Job) -> None:
        from mpillm.infer.decoding.print_answers import AnswerOptions, print_answers

        given = self._decoding(), self.metrics, self.outputs, self.as_json
        options = AnswerOptions(*given)
        print_answers(self._models, self.data, options, job.comm, job.console, self.device)
