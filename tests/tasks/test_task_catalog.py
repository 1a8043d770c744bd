from dataclasses import fields
from pathlib import Path

import pytest

from mpillm.errors import RecipeError, UsageError
from mpillm.tasks.metrics.metric_catalog import make_metrics
from mpillm.tasks.task import Task
from mpillm.tasks.task_catalog import (
    DEFAULT,
    READERS,
    TASKS,
    TaskSettings,
    check_read,
    check_task,
    make_task,
)


@pytest.mark.parametrize("name", TASKS)
def test_each_entry_is_a_task_that_names_itself_and_its_metrics(name: str) -> None:
    task = make_task(name)
    assert isinstance(task, Task)
    assert task.name == name
    assert [metric.name for metric in make_metrics(task.metrics)] == list(task.metrics)


def test_a_name_is_checked_without_an_import() -> None:
    check_task(DEFAULT)
    check_task("not_installed_here.tasks:Own")
    with pytest.raises(RecipeError, match=r"task.name = 'causal' is unknown; tasks: causal-lm"):
        check_task("causal")


def test_a_setting_that_the_task_does_not_read_is_refused() -> None:
    for settings in (
        TaskSettings("dpo", beta=0.3),
        TaskSettings("kto", desirable_weight=2.0),
        TaskSettings("grpo", rewards=("number",), kl=0.0),
        TaskSettings("own_tasks:Own", beta=0.3),
        TaskSettings("masked-lm", mask_token="[MASK]"),
    ):
        check_read(settings)
    with pytest.raises(RecipeError, match=r"task.beta = 0.3 is a setting of dpo and kto, and the"):
        check_read(TaskSettings("causal-lm", beta=0.3))
    with pytest.raises(RecipeError, match=r'task.rewards = \["number"\] is a setting of grpo'):
        check_read(TaskSettings("chat", rewards=("number",)))
    assert set(READERS) < {each.name for each in fields(TaskSettings)}
    assert {name for readers in READERS.values() for name in readers} < set(TASKS)


def test_a_plugin_is_a_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_tasks.py").write_text(
        "from mpillm.tasks.causal_lm import CausalLM\nclass Own(CausalLM):\n    name = 'own'\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert make_task("own_tasks:Own").name == "own"
    with pytest.raises(UsageError, match="has no Other"):
        make_task("own_tasks:Other")
    with pytest.raises(UsageError, match="cannot be imported"):
        make_task("not_installed_here.tasks:Own")


def test_settings_of_the_loss_reach_a_task_with_a_cross_entropy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = TaskSettings(label_smoothing=0.1)
    assert make_task(DEFAULT, settings).label_smoothing == 0.1
    # An evaluation makes the task by its name.
    assert make_task(DEFAULT).label_smoothing == 0
    (tmp_path / "plain_tasks.py").write_text(
        "from mpillm.tasks.task import Task\n"
        "class Plain(Task):\n"
        "    def fields(self, raw): ...\n"
        "    def loss_sum(self, outputs, fields): ...\n"
        "    def weight(self, fields): ...\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert make_task("plain_tasks:Plain", TaskSettings("plain_tasks:Plain"))
    words = (
        r"task.label_smoothing = 0.1 and task.z_loss = 0.0001 changes a cross-entropy, and the task"
    )
    with pytest.raises(RecipeError, match=words):
        make_task("plain_tasks:Plain", TaskSettings("plain_tasks:Plain", 0.1, 1e-4))
