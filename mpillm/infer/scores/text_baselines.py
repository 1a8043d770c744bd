"""Classical classifiers of texts as baselines: logistic regression of words, and of their vectors.

They learn the training texts of a run, decoded from its pairs, and are scored on its validation
rows by the metrics of the model.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mpillm.errors import DataError
from mpillm.infer.scores.exact_sums import BATCH_ROWS, in_batches
from mpillm.infer.scores.score import Score, score_rows
from mpillm.models.spec import ModelSpec
from mpillm.system.extras import require_packages
from mpillm.tasks.metrics.metric import Array, Metric
from mpillm.tasks.task import Task
from mpillm.tasks.vocabulary import Lengths
from mpillm.tokens.pairs.pair_reader import PairReader
from mpillm.tokens.samples import RowShape
from mpillm.tokens.tokenizer import Tokenizer

if TYPE_CHECKING:
    from mpi4py import MPI

# What a class that the training texts lack has in place of 0, whose logarithm is not finite.
LEAST_SHARE = 1e-12
VECTOR_WIDTH, EPOCHS, SEED = 100, 20, 0
MOST_ITERATIONS = 1000


def require_text_baselines() -> None:
    """Raise UsageError where the packages are missing."""
    require_packages("--baselines of classes", "sklearn", "gensim")


def score_text_baselines(
    train: PairReader,
    held_out: PairReader,
    tokenizer: Tokenizer,
    task: Task,
    spec: ModelSpec,
    metrics: Sequence[Metric],
    comm: "MPI.Intracomm",
) -> dict[str, Score]:
    """Score bag of words, TF-IDF and Word2Vec with logistic regression, by name.

    `comm`: of one rank, which has all rows. Texts are cut as the model reads them. Raises DataError
    where the training texts are of one class.
    """
    row = RowShape.of(task, Lengths.of(spec))
    texts, labels = read_texts(train, row, tokenizer)
    tested, targets = read_texts(held_out, row, tokenizer)
    if len(set(labels.tolist())) < 2:
        raise DataError(
            "--baselines learn the classes of the training texts, and these are of one class "
            "alone; prepare data with more, or leave --baselines out"
        )
    classes, scores = len(task.classes), {}
    for name, features in (
        ("bag of words", _words),
        ("TF-IDF", _weighted_words),
        ("Word2Vec", _vectors),
    ):
        learnt, asked = features(texts, tested)
        logs_NV = _log_probabilities(learnt, labels, asked, classes)
        scores[name] = _score(logs_NV, targets, metrics, comm)
    return scores


def read_texts(reader: PairReader, row: RowShape, tokenizer: Tokenizer) -> tuple[list[str], Array]:
    """Read the texts of a split, and the number of the class of each."""
    texts, labels = [], []
    for first in range(0, reader.n_pairs, BATCH_ROWS):
        numbers = np.arange(first, min(first + BATCH_ROWS, reader.n_pairs), dtype=np.int64)
        raw = reader.read(numbers, row)
        for ids, length in zip(raw["source"], raw["source_lengths"].tolist(), strict=True):
            texts.append(tokenizer.decode(ids[:length]))
        labels.append(raw["label"])
    return texts, np.concatenate(labels)


def _words(texts: Sequence[str], tested: Sequence[str]) -> tuple[Any, Any]:
    from sklearn.feature_extraction.text import CountVectorizer

    words = CountVectorizer()
    return words.fit_transform(texts), words.transform(tested)


def _weighted_words(texts: Sequence[str], tested: Sequence[str]) -> tuple[Any, Any]:
    from sklearn.feature_extraction.text import TfidfVectorizer

    words = TfidfVectorizer(ngram_range=(1, 2))
    return words.fit_transform(texts), words.transform(tested)


def _vectors(texts: Sequence[str], tested: Sequence[str]) -> tuple[Any, Any]:
    """Take the mean of the vectors of a text's words, learnt from the training texts (CBOW)."""
    from gensim.models import Word2Vec
    from gensim.utils import simple_preprocess
    from sklearn.preprocessing import StandardScaler

    words = [simple_preprocess(text) for text in texts]
    # One worker: several would draw in another order each time.
    model = Word2Vec(
        words, vector_size=VECTOR_WIDTH, min_count=1, epochs=EPOCHS, seed=SEED, workers=1
    )

    def means(parted: Sequence[Sequence[str]]) -> Array:
        zero = np.zeros((1, VECTOR_WIDTH))
        known = ([model.wv[word] for word in each if word in model.wv] for each in parted)
        return np.array([np.mean(each or zero, axis=0) for each in known])

    # Vectors of a small corpus are short: the penalty of the regression would hide them.
    scale = StandardScaler()
    learnt = scale.fit_transform(means(words))
    return learnt, scale.transform(means([simple_preprocess(text) for text in tested]))


def _log_probabilities(learnt: Any, labels: Array, asked: Any, classes: int) -> Array:
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(max_iter=MOST_ITERATIONS).fit(learnt, labels)
    shares_NV = np.zeros((asked.shape[0], classes))
    shares_NV[:, model.classes_] = model.predict_proba(asked)
    return np.asarray(np.log(np.maximum(shares_NV, LEAST_SHARE)))


def _score(
    logs_NV: Array, targets_N: Array, metrics: Sequence[Metric], comm: "MPI.Intracomm"
) -> Score:
    """Score rows by the logarithms of their probabilities, each with the weight 1."""
    rows = len(targets_N)
    losses_N = -logs_NV[np.arange(rows), targets_N]
    fields = {"targets": targets_N}
    tables = [m.of_rows([logs_NV], fields) for m in metrics if not m.needs_totals_alone]
    whole = np.concatenate([losses_N[:, None], np.ones((rows, 1)), *tables], axis=1)
    return score_rows(
        in_batches(np.arange(rows), whole),
        [table.shape[1] for table in tables],
        metrics,
        comm,
        rows=rows,
    )
