"""``pyengine-run`` as a conversation, driven through a pseudo-terminal: what a person types and sees."""

from __future__ import annotations

import os
import random
import re
import signal
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

import pyengine
from pyengine.chat import ChatTemplate, build_prompt
from pyengine.cli import commands, common
from pyengine.cli.history import MessageHistory
from tests.cli.terminal import Terminal
from tests.support import ROOT

RUN = [sys.executable, "-m", "pyengine.cli.run", "--demo", "--temp", "0"]
SLOW = [sys.executable, "-m", "tests.cli.slow_run", "--demo", "--temp", "0"]
BIG = "".join(f"line {i}: the quick brown fox counts {i * 7}\n" for i in range(10_000))
FOLDED = re.compile(r"thought for \d+\.\d s, ([\d,]+) tokens")

Start = Callable[..., Terminal]


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """``$XDG_STATE_HOME``."""
    return tmp_path / "state"


@pytest.fixture
def start(state: Path, tmp_path: Path) -> Iterator[Start]:
    """Starts a program on a terminal in a folder of its own, and waits for its prompt."""
    with ExitStack() as stack:

        def begin(*options: str, command: list[str] = RUN, size: tuple[int, int] = (80, 24), **env: str) -> Terminal:
            kept = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "PYENGINE_ISA", "VISUAL", "EDITOR")}
            kept |= {"PYTHONPATH": str(ROOT), "TERM": "xterm-256color", "XDG_STATE_HOME": str(state), **env}
            terminal = Terminal([*command, *options], kept, cwd=tmp_path, columns=size[0], rows=size[1])
            stack.enter_context(terminal)
            terminal.wait_for_prompt()
            return terminal

        yield begin


def say(terminal: Terminal, text: str) -> str:
    """Sends a message or a command; returns what was printed until the next prompt."""
    terminal.type(text + "\r")
    terminal.wait_for("\n")
    return terminal.wait_for_prompt()


def leave(terminal: Terminal) -> None:
    terminal.type("/bye\r")
    assert terminal.exit_code() == common.EXIT_OK
    assert "Traceback" not in terminal.seen


# ---- conversations ----


def test_reasoning_is_folded_and_the_second_turn_reads_only_what_is_new(start: Start) -> None:
    chat = start()
    say(chat, "What is 27 + 58?")
    assert [line for line in chat.lines() if line][-3:-1] == [chat.lines()[-4], "27 + 58 = 85"]
    folded = FOLDED.search("\n".join(chat.lines()))
    assert folded is not None
    first = say(chat, "/stats")
    assert f"{folded[1]} of them thought" in first
    say(chat, "And 5 times 7?")
    second = say(chat, "/stats")
    prompt, kept, new = (int(n) for n in re.findall(r"prompt +(\d+) tokens: (\d+) kept, (\d+) new", second)[0])
    # what both prompts begin with was not read again
    with pyengine.Model.open(pyengine.demo_model_path()) as model:
        template = ChatTemplate.from_metadata(model.metadata, model.tokenizer)
        messages = [{"role": "user", "content": "What is 27 + 58?"}]
        before = build_prompt(template, model.tokenizer, messages).ids
        messages += [{"role": "assistant", "content": "27 + 58 = 85"}, {"role": "user", "content": "And 5 times 7?"}]
        after = build_prompt(template, model.tokenizer, messages).ids
    shared = next(i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b)
    assert prompt == len(after)
    assert kept >= shared >= 10
    assert new == prompt - kept
    leave(chat)


@pytest.mark.parametrize("think", ["show", "dim", "hide"])
def test_reasoning_is_shown_followed_or_hidden(start: Start, think: str) -> None:
    chat = start("--think", think, command=SLOW, SLOW="0.03")
    printed = say(chat, "What is 27 + 58?")
    text = "\n".join(chat.lines())
    assert "27 + 58 = 85" in text
    assert ("Ones: 7 + 8 = 15, write 5, carry 1." in text) == (think == "show")
    assert bool(FOLDED.search(text)) == (think != "hide")
    # the line that follows the thought shows some of it in passing, as often as the machine has time to draw it
    assert any(word in printed for word in ("need to", "Ones", "Tens", "carry", "write")) == (think != "hide")
    assert "\x1b[2m" in printed
    assert "thinking" not in text
    leave(chat)


def test_every_command_does_what_help_says(start: Start, tmp_path: Path) -> None:
    chat = start()
    listed = say(chat, "/help")
    for command in commands.COMMANDS:
        assert command.name in listed
        assert command.help.split(";")[0][:30] in listed
    assert "there is no answer yet" in say(chat, "/stats")
    assert "no message yet" in say(chat, "/regen")
    assert "(nothing to take back)" in say(chat, "/undo")
    say(chat, "What is 3 + 4?")
    assert "So 3 + 4 = 7." in say(chat, "/think")
    say(chat, "/regen")
    assert chat.lines().count("3 + 4 = 7") == 2
    assert "[user]\r\nWhat is 3 + 4?" in say(chat, "/show messages")
    assert "(taken back)" in say(chat, "/undo")
    assert "messages  0" in say(chat, "/show")
    # thinking
    assert "(reasoning: show)" in say(chat, "/think show")
    say(chat, "What is 5 + 6?")
    assert "So 5 + 6 = 11." in chat.lines()
    assert "expected nothing or one of show, dim, hide" in say(chat, "/think loudly")
    # settings
    say(chat, "/set temp 0.25")
    say(chat, "/set n-predict 3")
    say(chat, "/set logit_bias=5+1.5")
    shown = say(chat, "/set").replace("\r\n", " ")
    assert "temp 0.25" in shown
    assert "n-predict 3" in shown
    assert "logit-bias 5+1.5" in shown
    say(chat, "What is 8 + 1?")
    assert "answer   3 tokens" in say(chat, "/stats")
    say(chat, "/set n-predict off")
    assert "--top-p: top_p is -1.0; expected a number >= 0" in say(chat, "/set top-p -1")
    assert "did you mean top-p?" in say(chat, "/set topp 1")
    assert "--top-k" in say(chat, "/set top-k many")
    assert "at least 1, or off" in say(chat, "/set n-predict x")
    # numbers
    say(chat, "/stats on")
    told = say(chat, "What is 2 + 2?")
    assert re.search(r"prompt +\d+ tokens: .*answer +\d+ tokens.*context +\d+ of 1,024", told, re.DOTALL)
    say(chat, "/stats off")
    # the system prompt
    assert "(no system prompt)" in say(chat, "/system")
    assert "system prompt: Be kind." in say(chat, "/system Be kind.")
    assert "system    Be kind." in say(chat, "/show")
    assert "(a new conversation)" in say(chat, "/clear")
    assert "messages  1" in say(chat, "/show")
    assert "(no system prompt)" in say(chat, "/system -")
    assert "<think>" in say(chat, "/show template")
    # what is none
    assert "unknown command /stat: did you mean /stats?" in say(chat, "/stat")
    assert "a space before it makes it a message" in say(chat, "/xyzzy").replace("\r\n", " ")
    leave(chat)


def test_a_file_goes_before_the_message(start: Start, tmp_path: Path) -> None:
    (tmp_path / "sum.txt").write_text("What is 27 + 58?\n")
    (tmp_path / "with space.txt").write_text("What is 1 + 2?\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    (tmp_path / "empty.txt").touch()
    chat = start()
    assert "sum.txt: 1 lines, 17 characters; goes before your next message" in say(chat, "/read sum.txt")
    assert "27 + 58 = 85" in say(chat, "")
    say(chat, "/read 'with space.txt' Please.")
    assert "What is 1 + 2?\r\n\r\nPlease." in say(chat, "/show messages")
    say(chat, "/read with space.txt")
    assert "(the file was put away)" in say(chat, "/undo")
    for name, complaint in {
        "": "which file?",
        "nothing.txt": "is not there",
        ".": "no regular file",
        "/dev/null": "no regular file",
        "latin.txt": "not valid UTF-8 (byte 4)",
        "empty.txt": "is empty",
        "x" * 5000: "File name too long",
        "~nobody/x": "is not there",
    }.items():
        assert complaint in say(chat, f"/read {name}")
    assert "messages  4" in say(chat, "/show")
    leave(chat)


def test_a_saved_conversation_goes_on_without_being_read_again(start: Start, tmp_path: Path) -> None:
    chat = start()
    say(chat, "/system Be kind.")
    say(chat, "What is 27 + 58?")
    say(chat, "/set top-k 7")
    assert re.search(r"talk.chat: 3 messages, the keys of \d+ tokens, [\d.]+ MiB", say(chat, "/save talk.chat"))
    say(chat, "And 5 times 7?")
    uninterrupted = say(chat, "/show messages")
    leave(chat)
    assert stat.S_IMODE((tmp_path / "talk.chat").stat().st_mode) == 0o600
    chat = start()
    assert "3 messages, the keys of " in say(chat, "/load talk.chat")
    assert "top-k 7" in say(chat, "/set")
    say(chat, "And 5 times 7?")
    assert say(chat, "/show messages") == uninterrupted
    kept, new = map(int, re.findall(r"(\d+) kept, (\d+) new", say(chat, "/stats"))[0])
    assert kept >= 10  # whatever was read ahead before it was saved
    assert new > 0
    # without keys; over a chat file, but over nothing else
    say(chat, "/save talk.chat --text")
    assert "5 messages, the keys of 0 tokens" in say(chat, "/load talk.chat")
    (tmp_path / "novel.txt").write_text("Call me Ishmael.")
    assert "exists and is not replaced" in say(chat, "/save novel.txt").replace("\r\n", " ")
    assert (tmp_path / "novel.txt").read_text() == "Call me Ishmael."
    for command, complaint in {
        "/load novel.txt": "novel.txt",
        "/load nothing.chat": "No such file",
        "/load": "which file?",
        "/save": "which file?",
        "/save a.chat b": "quote a name with spaces",
        "/save no/such/folder/x": "no/such/folder",
    }.items():
        assert complaint in say(chat, command).replace("\r\n", " ")
    assert "messages  5" in say(chat, "/show")
    leave(chat)


def test_the_last_message_can_be_edited(start: Start) -> None:
    chat = start()
    say(chat, "What is 27 + 58?")
    chat.type("/edit\r")
    chat.wait_for_prompt("What is 27 + 58?")
    chat.type("\x7f\x7f9?\r")
    assert "27 + 59 = 86" in chat.wait_for_prompt()
    assert "messages  2" in say(chat, "/show")
    chat.type("/edit\r")
    chat.wait_for_prompt("What is 27 + 59?")
    chat.interrupt()
    chat.wait_for_prompt()
    assert "27 + 59" in say(chat, "/show messages")  # nothing was lost
    leave(chat)


# ---- typing ----


def test_ten_thousand_pasted_lines_are_one_message_that_arrives_whole(start: Start) -> None:
    with pyengine.Model.open(pyengine.demo_model_path()) as model:
        template = ChatTemplate.from_metadata(model.metadata, model.tokenizer)
        expected = len(build_prompt(template, model.tokenizer, [{"role": "user", "content": BIG + " Why?"}]).ids)
    chat = start()
    begin = time.monotonic()
    chat.paste(BIG)
    chat.wait_for_prompt("[paste 1: 10,000 lines]")
    assert time.monotonic() - begin < 10.0
    chat.type(" Why?")
    chat.wait_for_prompt("[paste 1: 10,000 lines] Why?")
    assert f"the prompt has {expected} tokens, the context holds 1024" in say(chat, "").replace("\r\n", " ")
    assert len(chat.lines()) < 12  # the screen is not flooded
    assert "27 + 58 = 85" in say(chat, "What is 27 + 58?")
    leave(chat)


def test_a_paste_is_deleted_like_a_letter_and_a_short_one_stands_in_the_line(start: Start) -> None:
    chat = start()
    chat.paste(BIG)
    chat.wait_for_prompt("[paste 1: 10,000 lines]")
    chat.type("\x7f")
    chat.wait_for_prompt()
    chat.paste("What is\n27 + 58?")
    chat.wait_for("58?")
    assert "27 + 58 = 85" in say(chat, "")
    assert "[user]\r\nWhat is\r\n27 + 58?" in say(chat, "/show messages")
    leave(chat)


def test_several_lines_are_typed_with_alt_enter_or_quotes(start: Start) -> None:
    chat = start()
    chat.type("What is\x1b\r1 + 2?")
    chat.wait_for("2?")
    assert "1 + 2 = 3" in say(chat, "")
    assert "[user]\r\nWhat is\r\n1 + 2?" in say(chat, "/show messages")
    chat.type('"""What is\r4 + 5?"""')
    chat.wait_for('"""')
    assert "4 + 5 = 9" in say(chat, "")
    assert "[user]\r\nWhat is\r\n4 + 5?\r\n" in say(chat, "/show messages")
    leave(chat)


def test_tab_completes_commands_settings_and_files(start: Start, tmp_path: Path) -> None:
    (tmp_path / "a question.txt").write_text("What is 3 + 3?")
    chat = start()
    for typed, completed in {
        "/sta": "/stats",
        "/think h": "/think hide",
        "/set xtc-p": "/set xtc-probability",
        "/read a": "/read a question.txt",
    }.items():
        chat.type(typed + "\t")
        chat.wait_for_prompt(completed)
        chat.type("\x15")
        chat.wait_for_prompt()
    chat.type("/s\t")  # several: they are listed
    chat.wait_for("/save")
    chat.wait_for_prompt("/s")  # while it lists, the terminal itself would take Ctrl-U
    chat.type("\x15")
    chat.wait_for_prompt()
    leave(chat)


def test_what_is_typed_during_an_answer_waits_for_the_prompt(start: Start) -> None:
    chat = start(command=SLOW)
    chat.type("What is 27 + 58?\r")
    chat.wait_for("thinking")
    chat.type("What is 1 + 1?")
    chat.wait_for_prompt("What is 1 + 1?")
    assert "27 + 58 = 85" in chat.lines()
    chat.type("\x15")
    leave(chat)


@pytest.mark.parametrize("term", ["xterm-256color", "dumb"])
def test_bytes_that_are_no_text_are_refused_and_nothing_is_sent(start: Start, term: str) -> None:
    chat = start(TERM=term)
    chat.type(b"caf\xe9\r" if term != "dumb" else b"caf\xe9\n")
    chat.wait_for("not valid UTF-8 (byte 4)")
    chat.wait_for("nothing was sent")
    chat.wait_for_prompt()
    assert "messages  0" in say(chat, "/show")
    leave(chat)


# ---- Ctrl-C, Ctrl-D, the end ----


def test_ctrl_c_stops_an_answer_and_again_leaves(start: Start) -> None:
    chat = start("--think", "show", command=SLOW)
    chat.type("What is 27 + 58?\r")
    chat.wait_for("Ones")
    chat.interrupt()
    chat.wait_for("(stopped; no answer had begun: your message was taken back; Ctrl-C again\r\nleaves)")
    chat.wait_for_prompt()
    assert "27 + 59 = 86" in say(chat, "What is 27 + 59?")  # it goes on
    chat.type("What is 1 + 1?\r")
    chat.wait_for("need")
    chat.interrupt()
    chat.wait_for("(stopped")
    chat.wait_for_prompt()
    chat.interrupt()
    chat.wait_for("pyengine-run: interrupted")
    assert chat.exit_code() == common.EXIT_INTERRUPTED


def test_ctrl_c_keeps_what_was_said(start: Start) -> None:
    chat = start(command=SLOW)
    chat.type("What is 27 + 58?\r")
    chat.wait_for("27 + ")  # the answer, or the thought in passing
    chat.wait_for("thought for")
    chat.wait_for("27 ")
    chat.interrupt()
    chat.wait_for("(stopped; Ctrl-C again leaves)")
    chat.wait_for_prompt()
    assert "[assistant]\r\n27 " in say(chat, "/show messages")
    leave(chat)


def test_ctrl_c_twice_leaves_during_an_answer(start: Start) -> None:
    chat = start(command=SLOW, SLOW="0.3")
    chat.type("What is 27 + 58?\r")
    chat.wait_for("thinking")
    chat.interrupt()
    time.sleep(0.05)  # two signals at once are one
    chat.interrupt()
    chat.wait_for("pyengine-run: interrupted")
    assert chat.exit_code() == common.EXIT_INTERRUPTED


def test_ctrl_c_at_a_line_takes_it_back_and_at_an_empty_one_asks_first(start: Start) -> None:
    chat = start()
    for _ in range(3):
        chat.type("half a thou")
        chat.wait_for_prompt("half a thou")
        chat.interrupt()
        chat.wait_for_prompt()
    chat.interrupt()
    chat.wait_for("(Ctrl-C again or Ctrl-D leaves)")
    chat.wait_for_prompt()
    assert "messages  0" in say(chat, "/show")
    chat.interrupt()
    chat.wait_for("(Ctrl-C again or Ctrl-D leaves)")
    chat.wait_for_prompt()
    chat.interrupt()
    chat.wait_for("pyengine-run: interrupted")
    assert chat.exit_code() == common.EXIT_INTERRUPTED


def test_ctrl_c_while_a_long_prompt_is_read_leaves_a_usable_chat(start: Start) -> None:
    chat = start(command=SLOW, STUCK_ABOVE="100")
    chat.paste("What is 1 + 1? " * 40)
    chat.wait_for("1 + 1?")
    chat.type("\r")
    chat.wait_for("reading")
    chat.wait_for("tokens")
    begin = time.monotonic()
    chat.interrupt()
    chat.wait_for("(stopped")
    assert time.monotonic() - begin < 2.5
    chat.wait_for_prompt()
    assert "reading" not in "\n".join(chat.lines())
    assert "27 + 58 = 85" in say(chat, "What is 27 + 58?")
    leave(chat)


def test_ctrl_c_at_any_moment_stops_the_answer_and_nothing_else(start: Start) -> None:
    """A quick share of tests/cli/interrupts.py, which measures how long it takes on a large model."""
    dice = random.Random(11)
    endless = ["--logit-bias", "42+1000", "--loop-limit", "0", "--speculate", "off"]  # 10,000 tokens, one by one
    chat = start("-c", "16384", *endless)
    for trial in range(16):
        chat.paste("".join(f"{trial} line {i}\n" for i in range(1500 if trial % 2 else 11)))
        chat.wait_for("lines]")
        chat.type("\r")
        time.sleep(dice.uniform(0.0, 0.5))
        begin = time.monotonic()
        chat.interrupt()
        chat.wait_for("(stopped")
        assert time.monotonic() - begin < 2.5
        chat.wait_for_prompt()
        say(chat, "/clear")
    say(chat, "/set logit-bias 42-1")
    assert "27 + 58 = 85" in say(chat, "What is 27 + 58?")
    leave(chat)


def test_ctrl_d_leaves(start: Start) -> None:
    for term in ("xterm", "dumb"):
        chat = start(TERM=term)
        chat.type("\x04")
        assert chat.exit_code() == common.EXIT_OK


IGNORING = ["sh", "-c", "trap '' HUP; exec \"$@\"", "sh", *SLOW]  # as under nohup


@pytest.mark.parametrize("command", [SLOW, IGNORING], ids=["told", "not told"])
def test_a_closed_window_ends_the_program(start: Start, command: list[str]) -> None:
    for message in ("", "What is 27 + 58?\r"):
        chat = start(command=command)
        chat.type(message)
        time.sleep(0.3)
        chat.hang_up()
        assert chat.exit_code(10.0) in (-signal.SIGHUP, common.EXIT_OK, common.EXIT_PIPE, common.EXIT_ERROR)


def test_a_reader_that_goes_away_ends_a_chat_quietly(start: Start) -> None:
    script = '"$@" | head -c 5; echo " and the code is ${PIPESTATUS[0]}"'
    chat = start(command=["bash", "-c", script, "bash", *SLOW], SLOW="0.02")
    chat.type("What is 27 + 58?\n")
    chat.wait_for(f"and the code is {common.EXIT_PIPE}")
    assert "rror" not in chat.seen


# ---- the screen ----


def test_a_change_of_size_hurts_neither_the_line_nor_the_answer(start: Start) -> None:
    chat = start(command=SLOW)
    chat.type("What is 27 + 58, and why, I wonder, is it not something else?")
    chat.wait_for_prompt("What is 27 + 58, and why, I wonder, is it not something else?")
    for size in ((100, 30), (200, 50), (120, 10)):
        chat.resize(*size)
        chat.wait_for_prompt("What is 27 + 58, and why, I wonder, is it not something else?")
    chat.type("\x15What is 27 + 58?\r")
    for size in ((40, 20), (9, 5), (130, 40), (80, 24)):
        time.sleep(0.3)
        chat.resize(*size)
    chat.wait_for_prompt()
    assert "27 + 58 = 85" in chat.lines()
    assert FOLDED.search("\n".join(chat.lines()))
    leave(chat)


def test_loading_and_reading_tell_how_far_they_are_and_what_is_left(start: Start) -> None:
    chat = start("-c", "8192", command=SLOW, SLOW="0.2", SLOW_LOAD="0.8")
    assert re.search(r"loading demo-q8_0.gguf: 50%, 0:01 left\r\x1b\[J", chat.seen)
    chat.paste("".join(f"line {i}\n" for i in range(300)))
    chat.wait_for("lines]")
    chat.type("\r")
    told = chat.wait_for("thinking")
    steps = [
        (int(done.replace(",", "")), total)
        for done, total in re.findall(r"reading ([\d,]+)/([\d,]+) tokens, 0:0\d", told)
    ]
    assert len({total for _, total in steps}) == 1
    assert len({done for done, _ in steps}) >= 3
    assert all(done % 256 == 0 for done, _ in steps)
    assert steps == sorted(steps)
    chat.interrupt()
    chat.wait_for_prompt()
    assert not [line for line in chat.lines() if line.startswith(("reading", "loading", "thinking"))]
    leave(chat)


@pytest.mark.parametrize("columns", [40, 20])
def test_narrow_terminals_show_everything(start: Start, columns: int) -> None:
    chat = start(command=SLOW, SLOW="0.01", size=(columns, 24))
    say(chat, "What is 27 + 58?")
    assert "27 + 58 = 85" in chat.lines()
    say(chat, "/help")
    joined = " ".join(line.strip() for line in chat.lines())
    for command in commands.COMMANDS:
        assert command.help.split()[-1] in joined
    leave(chat)


def test_no_color_and_plain_terminals_get_no_faint_letters(start: Start) -> None:
    for env in ({"NO_COLOR": "1"}, {"TERM": "vt100"}, {"TERM": "dumb"}):
        chat = start("--think", "show", **env)
        assert "27 + 58 = 85" in say(chat, "What is 27 + 58?") or env.get("TERM") == "dumb"
        assert not re.search(r"\x1b\[(?:\d+;)*[1-9]\d*(?:;\d+)*m", chat.seen), env
        leave(chat)


def test_a_dumb_terminal_gets_no_control_sequences_at_all_and_can_do_the_same(start: Start) -> None:
    chat = start(TERM="dumb")
    assert "27 + 58 = 85" in say(chat, "What is 27 + 58?")
    chat.type('"""\nWhat is\n')
    chat.wait_for("...")
    chat.type('4 + 5?\n"""\n')
    assert "4 + 5 = 9" in chat.wait_for_prompt()
    assert "What is\r\n4 + 5?" in say(chat, "/edit")  # to be typed anew
    assert "1 + 2 = 3" in say(chat, "What is 1 + 2?")
    leave(chat)
    assert "\x1b" not in chat.seen


def test_ten_thousand_lines_pasted_into_a_dumb_terminal_are_one_message(start: Start) -> None:
    with pyengine.Model.open(pyengine.demo_model_path()) as model:
        template = ChatTemplate.from_metadata(model.metadata, model.tokenizer)
        expected = len(build_prompt(template, model.tokenizer, [{"role": "user", "content": BIG.rstrip()}]).ids)
    chat = start(TERM="dumb")
    chat.type(BIG)
    chat.wait_for(f"the prompt has {expected} tokens")
    chat.wait_for_prompt()
    leave(chat)


def test_without_prompt_toolkit_lines_are_read_plainly(start: Start, tmp_path: Path) -> None:
    (tmp_path / "prompt_toolkit.py").write_text("raise ImportError('not installed')")
    chat = start(PYTHONPATH=f"{tmp_path}:{ROOT}")
    chat.type("What is 27 + 58?\n")
    chat.wait_for("27 + 58 = 85")
    chat.wait_for_prompt()
    assert "\x1b[?2004h" not in chat.seen
    leave(chat)


# ---- history ----


def test_history_is_private_and_comes_back_the_next_day(start: Start, state: Path) -> None:
    file = state / "pyengine" / "history"
    chat = start()
    say(chat, "What is 27 + 58?")
    chat.type("What is\x1b\r1 + 2?\r")
    chat.wait_for("1 + 2 = 3")
    chat.wait_for_prompt()
    leave(chat)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700
    file.chmod(0o644)
    chat = start()
    chat.type("\x1b[A")
    chat.wait_for_prompt("/bye")
    chat.type("\x15")
    leave(chat)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert list(MessageHistory(file).load_history_strings()) == ["/bye", "What is\n1 + 2?", "What is 27 + 58?"]


def test_no_history_leaves_no_trace(start: Start, state: Path, tmp_path: Path) -> None:
    chat = start("--no-history")
    say(chat, "What is 27 + 58?")
    chat.type("\x1b[A")  # within the run it is there
    chat.wait_for_prompt("What is 27 + 58?")
    chat.type("\x15")
    leave(chat)
    assert list(tmp_path.iterdir()) == []


def test_a_history_that_cannot_be_used_is_no_reason_not_to_chat(start: Start, state: Path) -> None:
    file = state / "pyengine" / "history"
    file.parent.mkdir(parents=True)
    file.write_bytes(b'\xff\xfe{"a": 1}\n[3]\n"good"\nnot json\n')
    chat = start()
    chat.type("\x1b[A")
    chat.wait_for_prompt("good")
    chat.type("\x15")
    leave(chat)
    file.unlink()
    file.mkdir()
    chat = start()
    say(chat, "What is 27 + 58?")
    leave(chat)


def test_history_stays_small_and_keeps_no_novels(tmp_path: Path) -> None:
    history = MessageHistory(tmp_path / "history")
    for i in range(400):
        history.add(f"{i} " + "x" * 9_000)
    history.add("y" * 100_000)
    history.add("last")
    history.add("last")
    kept = list(MessageHistory(tmp_path / "history").load_history_strings())
    assert (tmp_path / "history").stat().st_size < (1 << 20) + 10_000
    assert kept[0] == "last"
    assert [text.split()[0] for text in kept[1:]] == [str(i) for i in range(399, 400 - len(kept), -1)]
    assert len(kept) > 50


# ---- answers that go round in circles ----


def test_an_answer_that_repeats_itself_is_ended_with_a_note(start: Start) -> None:
    chat = start("-c", "4096", "--logit-bias", "42+1000", "--loop-limit", "64")
    told = say(chat, "What is 27 + 58?").replace("\r\n", " ")
    assert re.search(r"thought for [\d.]+ s, 6\d tokens", told)  # 64, and those that close it
    assert "the answer was repeating itself word for word" in told
    assert 128 <= int(re.findall(r"answer +(\d+) tokens", say(chat, "/stats"))[0]) < 140
    say(chat, "/set loop-limit off")
    say(chat, "/set n-predict 900")
    assert "repeating" not in say(chat, "What is 27 + 58?")
    assert "answer   900 tokens" in say(chat, "/stats")
    leave(chat)


def test_a_thought_that_repeats_itself_is_closed_with_a_note(start: Start) -> None:
    chat = start("--logit-bias", "42+1000", "--loop-limit", "64", "-n", "80")
    assert "the thought was repeating itself word for word" in say(chat, "What is 27 + 58?").replace("\r\n", " ")
    leave(chat)
