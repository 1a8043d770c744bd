import os
from pathlib import Path

import pytest

from mpillm.errors import UsageError
from mpillm.launch.site import Site, leading_variable, load_site, parse_site

EXAMPLES = sorted((Path(__file__).parents[2] / "jobs" / "sites").glob("*.toml"))
HOME = {"HOME": "/h/me"}


def test_without_a_file_the_defaults_hold(tmp_path: Path) -> None:
    assert load_site(None, {"HOME": str(tmp_path)}) == Site()


def test_which_file_is_read(tmp_path: Path) -> None:
    for name, folder in (("own", ".config/mpillm"), ("xdg", "x/mpillm")):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "site.toml").write_text(f'account = "{name}"\n')
    named, set_ = tmp_path / "named.toml", tmp_path / "set.toml"
    named.write_text('account = "named"\n')
    set_.write_text('account = "set"\n')
    home = {"HOME": str(tmp_path)}
    assert load_site(None, home).account == "own"
    assert load_site(None, home | {"XDG_CONFIG_HOME": str(tmp_path / "x")}).account == "xdg"
    assert load_site(None, home | {"MPILLM_SITE": str(set_)}).account == "set"
    assert load_site(named, home | {"MPILLM_SITE": str(set_)}).account == "named"


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_mark_of_an_editor_is_taken_off(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "site.toml").write_text('account = "a"\r\n', encoding=encoding)
    assert load_site(tmp_path / "site.toml", {}).account == "a"


@pytest.mark.parametrize(
    "text",
    [
        "cores_per_node = nan",
        "cores_per_node = 1e300",
        "cores_per_node = " + "9" * 5000,
        "a = " + "[" * 5000,
        "account = 3",
        "variables = 1",
        "variables = {a = 1}",
        "modules = [1]",
        "[variables.a]",
        "account = 'a'\naccount = 'b'",
        "profile = '\0'",
    ],
)
def test_whatever_is_in_a_site_file_is_a_message(tmp_path: Path, text: str) -> None:
    (tmp_path / "site.toml").write_text(text)
    with pytest.raises(UsageError, match=r"site file .*site\.toml"):
        load_site(tmp_path / "site.toml", {})


def test_a_file_that_was_named_must_be_there(tmp_path: Path) -> None:
    for path, environment in (
        (tmp_path / "no.toml", {}),
        (None, {"MPILLM_SITE": str(tmp_path / "no.toml")}),
    ):
        with pytest.raises(UsageError, match=r"cannot read the site file .*no\.toml"):
            load_site(path, environment)
    with pytest.raises(UsageError, match="cannot read the site file"):
        load_site(tmp_path, {})
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfa")
    with pytest.raises(UsageError, match="byte 0 is not UTF-8"):
        load_site(tmp_path / "binary.toml", {})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("acount = 'x'", "unknown key acount, did you mean account"),
        ("xyzzy = 1", r"unknown key xyzzy \(known: scheduler, "),
        ("cores_per_node = '8'", r"cores_per_node = '8': input should be a valid integer"),
        ("cores_per_node = -1", "cores_per_node = -1: input should be greater than or equal to 0"),
        ("modules = 'GCC'", "modules = 'GCC': input should be a valid"),
        ("modules = ['GCC; rm']", r"each of modules is a word .*'GCC; rm'"),
        ("modules = ['-GCC']", "each of modules"),
        ("launcher = 'aprun'", "launcher = 'aprun': input should be ''"),
        ("partition = 'a b'", "partition is a word"),
        ('account = "a\\n#SBATCH --x"', "account is a word"),
        ("constraint = '$(x)'", "constraint has no space"),
        ("directives = ['exclusive']", "each of directives starts with -"),
        ('directives = ["--a\\nrm"]', "each of directives starts with -"),
        ("variables = {'A-B' = 'x'}", "the name of each of variables starts with a letter"),
        ("variables = {UID = '0'}", "bash sets UID itself"),
        ("variables = {A = 1}", "variables.A = 1: input should be a valid string"),
        ('variables = {A = "x\\ny"}', r"variables.A = 'x\\ny' holds '\\n'"),
        ("environment = 'venv'", "environment is an absolute path"),
        ("environment = '$NOT_SET/venv'", "begins with \\$NOT_SET, which is not set"),
        ("node_local = 'tmp'", "node_local is a folder such as"),
        ('launcher_arguments = ["a\\tb"]', r"holds '\\t'"),
        ("= 1", "not valid TOML"),
        (f"cores_per_node = {'9' * 5000}", "not valid TOML: .*digits"),
        (f"cores_per_node = 0x{'f' * 5000}", "a value cannot be read: .*digits"),
        ("cores_per_node = 99999999999", "less than or equal to 10000000"),
        ("stop_seconds = inf", "stop_seconds = inf: input should be"),
        ("x = " + "[" * 5000, "not valid TOML"),
        ("account = 'a'\nqos = 1\nxyz = 2", "qos = 1: .*; unknown key xyz"),
    ],
)
def test_faults_are_told_with_the_way_out(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as failure:
        parse_site(text, "site.toml", HOME)
    assert str(failure.value).startswith("the site file site.toml")


def test_paths_begin_with_home_or_a_variable() -> None:
    site = parse_site(
        "environment = '~/venv'\nprofile = '$WORK_DIR/c.json'\n", "s", HOME | {"WORK_DIR": "/w"}
    )
    assert (site.environment, site.profile) == ("/h/me/venv", "/w/c.json")
    assert parse_site("environment = '${HOME}/v'", "s", HOME).environment == "/h/me/v"


def test_a_leading_variable() -> None:
    assert leading_variable("$TMPDIR/x y") == ("TMPDIR", "/x y")
    assert leading_variable("${TMPDIR}") == ("TMPDIR", "")
    assert leading_variable("/a/$B") == ("", "/a/$B")
    assert leading_variable("$A-b") == ("", "$A-b")
    assert leading_variable("$(x)/y") == ("", "$(x)/y")


def test_there_are_examples() -> None:
    assert len(EXAMPLES) >= 8


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_each_example_is_valid(path: Path) -> None:
    site = load_site(path, HOME)
    assert site.scheduler in ("slurm", "pbs", "lsf")


def test_files_of_other_encodings_and_kinds(tmp_path: Path) -> None:
    path, text = tmp_path / "my site.toml", "account = 'x'\n"
    path.write_text(text, encoding="utf-8-sig")
    assert load_site(path, HOME).account == "x"
    path.write_text(text, encoding="utf-16")
    assert load_site(path, HOME).account == "x"
    # A pipe without a writer would be waited for without end.
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(b"#" * (1 << 20) + b"#")
    path.write_bytes(b"account = '\xe9'\n")
    with pytest.raises(UsageError, match=r"site file .*: byte 11 is not UTF-8; save it as UTF-8"):
        load_site(path, HOME)
    for place, reason in (
        (tmp_path, "it is a folder and should be a plain file"),
        (Path("/dev/zero"), "it is a pipe or a device"),
        (tmp_path / "pipe", "it is a pipe or a device"),
        (tmp_path / "large", "it is larger than 1,048,576 bytes"),
        (Path("x" * 300), "File name too long"),
        (Path("a\0b"), "null"),
    ):
        with pytest.raises(UsageError, match=f"site file .*{reason}"):
            load_site(place, HOME)
