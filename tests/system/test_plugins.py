"""A plug-in that cannot be loaded: which name, why, and what helps."""

from pathlib import Path

import pytest

from mpillm.errors import UsageError
from mpillm.system.plugins import load_plugin
from mpillm.verbs.command import make_command

MODULES = {
    "raises": "raise RuntimeError('no licence\\nsecond line')",
    "broken": "def f(:\n",
    "leaves": "import sys\nsys.exit(0)\n",
    "lacks": "import package_that_is_absent\n",
    "good": "class Verb:\n    pass\nCOUNT = 3\n",
    "half": (
        "from dataclasses import dataclass\nfrom typing import Annotated\n"
        "@dataclass\nclass Verb:\n    a: 'Missing' = 1\n    def run(self): pass\n"
    ),
}


@pytest.fixture(autouse=True)
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, text in MODULES.items():
        (tmp_path / f"plugin_{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("plugin_raises:A", "cannot be imported: RuntimeError: no licence; correct the module"),
        ("plugin_broken:A", "cannot be imported: SyntaxError: .*; correct the module"),
        ("plugin_leaves:A", "cannot be imported: SystemExit: 0; correct the module"),
        ("plugin_lacks:A", "No module named 'package_that_is_absent'; install its package"),
        ("plugin_absent:A", "No module named 'plugin_absent'; install its package"),
        ("plugin_good:Werb", "module plugin_good has no Werb; did you mean plugin_good:Verb?"),
        ("plugin_good.deeper:A", "'plugin_good' is not a package"),
        ("plugin_good:", "no verb is called 'plugin_good:'"),
        ("", "no verb is called ''"),
    ],
)
def test_the_reason_and_the_cure(name: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        load_plugin(name, {}, "verb")


@pytest.mark.parametrize("name", ["plugin_good:Verb", "plugin_good:COUNT", "os:getcwd"])
def test_what_is_no_verb(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name} must name a dataclass with a method run"):
        make_command(name, load_plugin(name, {}, "verb"))


def test_a_verb_whose_options_cannot_be_read() -> None:
    with pytest.raises(UsageError, match="options of the verb v cannot be read: name 'Missing'"):
        make_command("v", load_plugin("plugin_half:Verb", {}, "verb"))
