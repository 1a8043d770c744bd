"""Questions, choices and solved examples of task files, and data that does not fit them."""

import json
from pathlib import Path
from typing import Any

import pytest

from mpillm.errors import DataError, MpillmError
from mpillm.infer.harness.examples import Example, make_examples
from mpillm.infer.harness.task_file import read_task
from tests.infer.harness.random_model import NAMES, RECORDED, TASKS

pytest.importorskip("yaml", reason="needs PyYAML: pip install 'mpillm[evaluate]'")
ROWS = [
    {"q": "Sky?", "kinds": ["blue", "red"], "right": 0, "word": "blue"},
    {"q": "Blood? ", "kinds": ["blue", "red"], "right": 1, "word": "red"},
    {"q": "Grass?", "kinds": ["green", "red"], "right": 0, "word": "green"},
]
BASE = {
    "task": "colours",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "q",
    "doc_to_choice": "kinds",
    "doc_to_target": "right",
}


def examples(
    folder: Path, limit: int | None = None, rows: Any = ROWS, **more: Any
) -> list[Example]:
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    # JSON is YAML.
    (folder / "task.yaml").write_text(json.dumps({**BASE, **more}))
    return make_examples(read_task(folder / "task.yaml"), limit)


def refused(folder: Path, **more: Any) -> str:
    with pytest.raises(MpillmError) as failure:
        examples(folder, **more)
    return str(failure.value)


@pytest.mark.parametrize("name", NAMES)
def test_requests_are_those_of_lm_eval(name: str) -> None:
    recorded = json.loads(RECORDED.read_text(encoding="utf-8"))[name]
    found = make_examples(read_task(TASKS / f"{name}.yaml"), None)
    ours = [[list(request) for request in each.requests] for each in found]
    assert ours == [each["requests"] for each in recorded["samples"]]


def test_targets_by_number_text_and_list(tmp_path: Path) -> None:
    assert [each.right for each in examples(tmp_path)] == [(0,), (1,), (0,)]
    for target in ("word", "{{word}}", "{{right}}", "{{[right]}}"):
        assert [each.right for each in examples(tmp_path, doc_to_target=target)] == [
            (0,),
            (1,),
            (0,),
        ]
    assert examples(tmp_path, doc_to_target=1)[0].right == (1,)
    assert len(examples(tmp_path, limit=2)) == 2


def test_texts_to_generate(tmp_path: Path) -> None:
    kept = {"output_type": "generate_until", "doc_to_choice": None}
    assert next(each.right for each in examples(tmp_path, doc_to_target="kinds", **kept)) == (
        "blue",
        "red",
    )
    assert examples(tmp_path, doc_to_target="right", **kept)[1].right == ("1",)
    text = examples(tmp_path, doc_to_target="word", description="Say it.", gen_prefix="So", **kept)
    assert text[0].requests == (("Say it.Sky? So",),)
    assert text[1].requests == (("Say it.Blood? So",),)


def test_the_examples_ahead_are_drawn_in_the_order_of_questions(tmp_path: Path) -> None:
    found = examples(tmp_path, num_fewshot=1, fewshot_split="test", doc_to_target="word")
    assert found == examples(tmp_path, num_fewshot=1, fewshot_split="test", doc_to_target="word")
    for each, row in zip(found, ROWS, strict=True):
        context = each.requests[0][0]
        # The question itself is never solved ahead of it.
        assert context.count(row["q"]) == 1
        assert context.endswith("\n\n" + row["q"])
    samples = {"samples": [{"q": "Coal?", "kinds": ["black"], "right": 0}]}
    [first, *_] = examples(tmp_path, num_fewshot=1, fewshot_config=samples, target_delimiter=" = ")
    assert first.requests == (
        ("Coal? = black\n\nSky?", " = blue"),
        ("Coal? = black\n\nSky?", " = red"),
    )


def test_columns_that_the_data_lacks_are_named_with_those_found(tmp_path: Path) -> None:
    for more in ({"doc_to_text": "question"}, {"doc_to_text": "{{question}} is"}):
        text = refused(tmp_path, **more)
        assert "'question'" in text
        assert "the columns are q, kinds, right, word" in text
    assert "doc_to_choice names the column 'options'" in refused(tmp_path, doc_to_choice="options")
    assert "doc_to_text is no template" in refused(tmp_path, doc_to_text="{{q")
    assert "doc_to_text gives ['blue', 'red'], and not a text" in refused(
        tmp_path, doc_to_text="kinds"
    )


def test_templates_run_in_a_sandbox(tmp_path: Path) -> None:
    assert "access to attribute '__class__'" in refused(
        tmp_path, doc_to_text="{{q.__class__.mro()}}"
    )
    [first, *_] = examples(tmp_path, doc_to_text="{{q | regex_replace('S', 's')}}\n")
    assert first.requests[0][0] == "sky?\n"


@pytest.mark.parametrize(
    ("more", "rule"),
    [
        ({"doc_to_choice": "{{[]}}"}, r"doc_to_choice gives no choices, but \[\], of"),
        ({"doc_to_choice": []}, "doc_to_choice gives no choices"),
        ({"doc_to_choice": ["a", ""]}, "each choice must be a text"),
        ({"doc_to_choice": "{{q}}"}, "doc_to_choice writes no list, but 'Sky"),
        ({"doc_to_target": 2}, r"the target of example 0 is 2, which is none of its 2 choices"),
        ({"doc_to_target": -1}, "nor a number from 0 to 1"),
        ({"doc_to_target": "q"}, r"is 'Sky\?', which is none of its 2 choices \('blue', 'red'\)"),
        ({"num_fewshot": 3}, "num_fewshot is 3, and rows.jsonl has 3 records to draw from"),
        ({"fewshot_split": "train", "num_fewshot": 1}, "the split 'train' is not in"),
    ],
)
def test_data_that_does_not_fit(tmp_path: Path, more: dict[str, Any], rule: str) -> None:
    with pytest.raises(MpillmError, match=rule):
        examples(tmp_path, **{"fewshot_split": "test", **more})


def test_an_empty_file_has_no_questions(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no record"):
        examples(tmp_path, rows=[])
