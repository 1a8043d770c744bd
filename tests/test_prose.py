"""The prose keeps its form: the field's words, docstrings that begin with a verb, reasons at lines.

docs/contributing.md states the rules. Each is a function over files, so that it is also shown to
fail on a planted fault.
"""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
HOUSE = ROOT / "mpillm"
# Words that hide the field's term: of space for time (behind), of speech for print and log (tell),
# and the like.
BANNED = (
    r"behind", r"besides?", r"amid(st)?", r"told", r"tells?", r"stands?", r"lies", r"wish(es|ed)?",
    r"hand(s|ed|ing)? (it |them )?on", r"hands? over", r"handed over", r"at the (least|most)",
    r"foretells?", r"naps?", r"looks? (at|for)", r"looked at", r"a look", r"two looks", r"thrice",
    r"for ever", r"be had", r"whoever", r"go(es)? on", r"going on", r"gone on", r"in good order",
    r"sets? out", r"set off", r"let go of", r"is no (rank|list|number|run|checkpoint)", r"in vain",
    r"anew", r"seldom", r"now and then", r"ails", r"patiently", r"kin", r"meet(s|ing)? in",
    r"under way", r"bears? the", r"spoken?", r"sign of life", r"way out",
)  # fmt: skip
BANNED_PATTERN = re.compile(r"\b(" + "|".join(BANNED) + r")\b", re.IGNORECASE)
# Literals of a format or of code that happen to be such a word.
ALLOWED = {
    ("bench/filesystem.py", "told"),
    ("docs/bench.md", "told"),
    ("train/recipe.py", "behind"),
    ("docs/train.md", "behind"),
}
# A function does something: its docstring begins with the verb.
NO_VERB = re.compile(
    r"^(What|Whether|How|Who|Whose|Where|When|Which|Why|The|An?|This|That|These|All|Every|Each|"
    r"No|One|True|False|If|As|From|Of|By|In|On|To|For|So|Its|Their|Here|There)\b"
)
LONGEST_SENTENCE = 24  # the rule is 20; a list or a title in one runs longer
COMMENTS_PER_100 = {"comm": 3.0, "parallel": 3.0}
PAGES = ("README.md", "CHANGELOG.md", "docs", "benchmarks", "data")


def texts(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, text) of the prose in a file: comments and strings of code, lines of pages."""
    source = path.read_text(encoding="utf-8")
    if path.suffix in (".py", ".pyi"):
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type in (tokenize.COMMENT, tokenize.STRING):
                yield token.start[0], token.string
    elif path.suffix in (".c", ".h"):
        for found in re.finditer(r'/\*.*?\*/|//[^\n]*|"[^"\n]*"', source, re.DOTALL):
            yield source.count("\n", 0, found.start()) + 1, found.group()
    else:
        yield from enumerate(source.splitlines(), 1)


def banned_words(paths: list[Path]) -> list[str]:
    return [
        f"{path}:{line + text.count(chr(10), 0, found.start())}: "
        f"{found.group()!r} hides the field's term"
        for path in paths
        for line, text in texts(path)
        for found in BANNED_PATTERN.finditer(text)
        if ("/".join(path.parts[-2:]), found.group()) not in ALLOWED
    ]


def docstring_faults(path: Path) -> list[str]:
    faults = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        text = ast.get_docstring(node)
        named = any(
            getattr(each, "id", "") in ("property", "cached_property")
            for each in node.decorator_list
        )
        if text and not named and NO_VERB.match(text):
            faults.append(
                f"{path.name}:{node.lineno}: {node.name} begins with {text.split()[0]!r}, "
                "not with a verb"
            )
        for sentence in re.split(r"(?<=[.;:])\s", " ".join((text or "").split())):
            if len(sentence.split()) > LONGEST_SENTENCE:
                faults.append(
                    f"{path.name}:{node.lineno}: {node.name} has a sentence of "
                    f"{len(sentence.split())} words"
                )
    return faults


def comment_density(folder: Path) -> float:
    """Return the comments per 100 lines of the Python files below `folder`."""
    comments = lines = 0
    for path in folder.rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        lines += source.count("\n")
        tokens = tokenize.generate_tokens(io.StringIO(source).readline)
        comments += sum(token.type == tokenize.COMMENT for token in tokens)
    return 100 * comments / max(1, lines)


def code_files() -> list[Path]:
    return [
        path
        for path in sorted(HOUSE.rglob("*"))
        if path.suffix in (".py", ".pyi", ".c", ".h", ".j2")
    ]


def page_files() -> list[Path]:
    found = [ROOT / name for name in PAGES]
    pages = [path for path in found if path.is_file()]
    return pages + sorted(page for path in found if path.is_dir() for page in path.rglob("*.md"))


def test_no_word_hides_the_fields_term() -> None:
    assert banned_words([*code_files(), *page_files()]) == []


def test_docstrings_begin_with_a_verb_and_are_short() -> None:
    assert [fault for path in sorted(HOUSE.rglob("*.py")) for fault in docstring_faults(path)] == []


def test_reasons_are_at_the_lines() -> None:
    densities = {room: comment_density(HOUSE / room) for room in COMMENTS_PER_100}
    assert {
        room: density for room, density in densities.items() if density < COMMENTS_PER_100[room]
    } == {}


def test_planted_prose_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.py"
    path.write_text(
        'def f():\n    """What lies behind it."""\n\n\n'
        'def g():\n    """Poll."""\n    return 1  # a look\n'
    )
    assert len(banned_words([path])) == 3
    assert docstring_faults(path) == ["a.py:1: f begins with 'What', not with a verb"]
    assert comment_density(tmp_path) == 100 / 7
    path.write_text('def f():\n    """Do ' + "so " * 30 + '."""\n')
    assert "sentence of" in docstring_faults(path)[0]
