"""Task files of lm-evaluation-harness: what is read, and what is refused by its name."""

from pathlib import Path

import pytest

from mpillm.errors import UsageError
from mpillm.infer.harness.harness_metrics import MetricSettings
from mpillm.infer.harness.task_file import TextSettings, read_task
from mpillm.infer.harness.yaml_file import read_yaml

pytest.importorskip("yaml", reason="needs PyYAML: pip install 'mpillm[evaluate]'")
TASKS = Path(__file__).parent / "tasks"
PLAIN = """
dataset_path: json
dataset_kwargs: {data_files: data.jsonl}
test_split: train
doc_to_text: question
doc_to_target: answer
"""
CHOICES = PLAIN + "output_type: multiple_choice\ndoc_to_choice: [a, b]\n"


def written(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text)
    return path


def refused(folder: Path, text: str) -> str:
    with pytest.raises(UsageError) as failure:
        read_task(written(folder, text))
    return str(failure.value)


def test_every_file_of_the_tests_is_read() -> None:
    tasks = {path.stem: read_task(path) for path in TASKS.glob("*.yaml")}
    assert {task.name for task in tasks.values()} == set(tasks)
    assert {task.output_type for task in tasks.values()} == {
        "multiple_choice",
        "loglikelihood",
        "loglikelihood_rolling",
        "generate_until",
    }
    task = tasks["caps_gen"]
    assert task.generation == TextSettings(("\n", "."), 12)
    assert [each.name for each in task.filters] == ["first", "plain"]
    assert task.filters[0]("it is Old Rome") == "Old"
    assert task.filters[0]("none") == "[invalid]"
    assert task.filters[1](" Rome ") == "Rome"
    assert tasks["caps_first"].fewshot.sampler == "first_n"
    assert tasks["caps_first"].description == task.description
    assert tasks["caps_prefix"].generation == TextSettings(("\n\n",), 8)


def test_the_usual_values_are_the_harnesss(tmp_path: Path) -> None:
    task = read_task(written(tmp_path, PLAIN))
    assert (task.name, task.output_type) == ("mine", "generate_until")
    assert task.generation == TextSettings(("\n\n",), 256)
    assert task.wording.target_delimiter == " "
    assert (task.fewshot.count, task.fewshot.delimiter) == (0, "\n\n")
    assert task.metrics == (MetricSettings("exact_match"),)
    assert [each.name for each in read_task(written(tmp_path, CHOICES)).metrics] == [
        "acc",
        "acc_norm",
    ]


def test_exact_match_ignores_what_it_is_asked_to() -> None:
    asked = MetricSettings("exact_match", True, True, True, (r"\$",))
    assert asked.matches("$12 Rome!", "rome 7") is False
    assert asked.matches("$12rome!", "ROME 7".replace(" ", "")) is True
    assert MetricSettings("exact_match").matches("Rome", "rome") is False


@pytest.mark.parametrize(
    ("more", "rule"),
    [
        ("process_docs: !function utils.work", r"line 7 has the tag !function \(utils.work\)"),
        ("process_results: utils.work", "the key process_results is not supported; known are"),
        ("use_prompt: x", "the key use_prompt is not supported"),
        ("repeats: 4", "repeats may be 1 alone"),
        ("output_type: chat", "output_type 'chat' is not one of multiple_choice, loglikelihood"),
        ("output_type: multiple_choice", "needs doc_to_choice"),
        ("dataset_path: hellaswag", "dataset_path 'hellaswag' is not one of json, csv, parquet"),
        ("dataset_kwargs: {data_files: a, field: [1]}", "field must be a text"),
        ("dataset_kwargs: {data_files: a, encoding: x}", r"the key dataset_kwargs.encoding is not"),
        ("dataset_kwargs: {}", "dataset_kwargs.data_files must be a file"),
        ("test_split: null", "test_split or validation_split must name a split"),
        ("doc_to_text: null", "the key doc_to_text is missing"),
        ("num_fewshot: -1", "num_fewshot must be a number from 0, and not -1"),
        (
            "fewshot_config: {sampler: balanced}",
            "sampler 'balanced' is not one of default, first_n",
        ),
        ("fewshot_config: {fewshot_indices: [1]}", "the key fewshot_config.fewshot_indices is not"),
        ("metric_list: [{metric: bleu}]", "the metric 'bleu' is not supported for output_type"),
        ("metric_list: [{metric: acc}]", "the metric 'acc' is not supported for output_type gener"),
        (
            "metric_list: [{metric: exact_match, aggregation: median}]",
            "exact_match has the aggregation mean, and not 'median'",
        ),
        ("metric_list: [{metric: exact_match, strict: 1}]", "exact_match has no key strict"),
        (
            "metric_list: [{metric: exact_match, regexes_to_ignore: ['(']}]",
            "regexes_to_ignore cannot be read",
        ),
        (
            "filter_list: [{name: a, filter: [{function: majority_vote}]}]",
            "the filter 'majority_vote' is not supported; take one of regex",
        ),
        (
            "filter_list: [{name: a, filter: [{function: take_first}, {function: regex}]}]",
            "the filter take_first must be the last",
        ),
        (
            "filter_list: [{name: a, filter: [{function: regex, regex_pattern: '('}]}]",
            "the filter regex cannot be read",
        ),
        ("generation_kwargs: {num_beams: 4}", "the key generation_kwargs.num_beams is not"),
        ("generation_kwargs: {do_sample: true}", "do_sample is true and its temperature 0"),
        ("generation_kwargs: {until: [1]}", "until must be a text or a list of texts"),
        ("generation_kwargs: {max_gen_toks: 0.5}", "max_gen_toks must be a number from 1"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(tmp_path: Path, more: str, rule: str) -> None:
    key = more.partition(":")[0]
    kept = "\n".join(line for line in PLAIN.splitlines() if not line.startswith(f"{key}:"))
    with pytest.raises(UsageError, match=rule):
        read_task(written(tmp_path, f"{kept}\n{more}\n"))


def test_settings_of_texts_are_of_texts_alone(tmp_path: Path) -> None:
    text = refused(tmp_path, CHOICES + "generation_kwargs: {until: a}\n")
    assert "generation_kwargs is of output_type generate_until" in text
    text = refused(
        tmp_path, CHOICES + "filter_list: [{name: a, filter: [{function: lowercase}]}]\n"
    )
    assert "the filter lowercase reads texts, and output_type multiple_choice gives none" in text


def test_files_that_are_no_tables(tmp_path: Path) -> None:
    assert "holds no table of keys and values, but list" in refused(tmp_path, "- a\n")
    assert "is no YAML" in refused(tmp_path, "a: [1\n")
    assert "includes itself" in refused(tmp_path, "include: mine.yaml\n")
    with pytest.raises(UsageError, match=r"cannot read .*nothing.yaml"):
        read_task(tmp_path / "nothing.yaml")
    (tmp_path / "base.yaml").write_text("a: 1\nb: 2\n")
    assert read_yaml(written(tmp_path, "include: base.yaml\nb: 3\n")) == {"a": 1, "b": 3}
