"""`mpillm chat`: turns, commands, what fits into the context, and Ctrl-C."""

import io
from collections.abc import Iterator

import pytest
from mpi4py import MPI

from mpillm.errors import UsageError
from mpillm.infer.sampling import Sampling
from mpillm.infer.serve.chat_terminal import ChatSession, chat_in_terminal, read_turns, talk
from mpillm.infer.serve.open_engine import EngineOptions
from mpillm.system.console import Console
from tests.infer.serve.http.served import publish_chat, tiny_model

GREEDY = Sampling(12, 0.0)


@pytest.fixture
def session() -> Iterator[ChatSession]:
    model = tiny_model(context=160)
    yield ChatSession(model.engine, model.tokenizer, model.template, GREEDY, "short")
    model.engine.close()


def silent(text: str) -> None:
    raise AssertionError(text)


def test_the_turns_are_the_prompt(session: ChatSession) -> None:
    first = "".join(session.ask("a", silent))
    second = "".join(session.ask("b", silent))
    written = [turn["content"] for turn in session._turns]
    assert written == ["a", first, "b", second]
    session.reset()
    assert "".join(session.ask("a", silent)) == first


def test_an_answer_that_is_stopped_is_kept(session: ChatSession) -> None:
    session.sampling = Sampling(100, 0.0)
    pieces = session.ask("a", silent)
    begun = next(pieces)
    session.engine.hold.clear()
    pieces.close()
    session.engine.hold.set()
    assert session._turns[-1] == {"role": "assistant", "content": begun}
    # The engine computes it no longer.
    "".join(session.ask("b", silent))
    assert session.engine.counts().finished["cancelled"] == 1


def test_the_oldest_turns_leave_a_full_context(session: ChatSession) -> None:
    notes: list[str] = []
    for _ in range(4):
        "".join(session.ask("a question of some length", notes.append))
    assert notes
    assert "oldest turns are left out" in notes[0]
    assert len(session._turns) < 8
    assert session._turns[0]["role"] == "user"
    with pytest.raises(UsageError, match="shorten it"):
        "".join(session.ask("a" * 150, silent))


def test_commands(session: ChatSession) -> None:
    out = io.StringIO()
    console = Console(stream=out, watched=False)
    talk(session, console, iter(["hello", "/reset", "/help", "/none", "/quit", "never"]))
    assert session._turns == []
    lines = out.getvalue()
    assert "the conversation is forgotten" in lines
    assert "/none is no command: /reset forgets" in lines
    assert session.engine.counts().finished == {"length": 1}


def test_ctrl_c_stops_an_answer_in_a_terminal(session: ChatSession) -> None:
    class Interrupted(Console):
        count = 0

        def write(self, text: str) -> None:
            self.count += 1
            if self.count == 2:
                raise KeyboardInterrupt

    talk(session, Interrupted(stream=io.StringIO(), watched=True), iter(["hello"]))
    assert session._turns[-1]["role"] == "assistant"
    # A pipe has no second turn to wait for, and a signal with a name ends the process.
    with pytest.raises(KeyboardInterrupt):
        talk(session, Interrupted(stream=io.StringIO(), watched=False), iter(["hello"]))


@pytest.mark.usefixtures("processes")
def test_lines_of_a_pipe_are_turns(
    tmp_path: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("safetensors")
    run = publish_chat(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n\nagain\n"))
    out = io.StringIO()
    given = GREEDY, EngineOptions(), MPI.COMM_SELF, Console(stream=out, watched=False)
    chat_in_terminal(run, "", *given)
    assert out.getvalue().count("\n") >= 2
    assert "> " not in out.getvalue()
    monkeypatch.setattr("sys.stdin", io.StringIO("a\n"))
    assert list(read_turns(Console(stream=out))) == ["a"]
