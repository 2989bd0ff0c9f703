"""Nothing touches the network unless a model is named ``hf:...``: seen by the kernel, and by Python's own audit."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import pyengine
from tests.cli.fake_hub import FakeHub, Repository
from tests.support import ROOT

DEMO = str(pyengine.demo_model_path())
PATH = f"{ROOT}{os.pathsep}{ROOT / 'tools' / 'convert'}"
# Every command, and the package from Python, as a list of arguments of ``python``; {out} is a new folder.
CALLS: dict[str, list[str]] = {
    "run": ["-m", "pyengine.cli.run", DEMO, "What is 27 + 58?", "-n", "4"],
    "run, with a draft": ["-m", "pyengine.cli.run", DEMO, "1 + 1?", "-n", "4", "--draft", DEMO],
    "run, of a file that is not there": ["-m", "pyengine.cli.run", "org/repo", "1 + 1?"],
    "plan of a file": ["-m", "pyengine.cli.plan", DEMO, "--no-speed"],
    "plan of a card": ["-m", "pyengine.cli.plan", "r1-distill-llama-8b", "--no-speed"],
    "perplexity": ["-m", "pyengine.cli.perplexity", DEMO, "-f", str(ROOT / "README.md"), "-c", "64", "--chunks", "1"],
    "imatrix": [
        *("-m", "pyengine.cli.imatrix", DEMO, "-f", str(ROOT / "README.md"), "-c", "64", "--chunks", "1"),
        *("-o", "{out}/m.gguf"),
    ],
    "convert": ["-m", "pyengine_convert.cli", DEMO, "-o", "{out}/f16.gguf", "--type", "f16"],
    "inspect": ["-m", "pyengine_convert.cli", "inspect", DEMO],
    "Python": [
        "-c",
        "import pyengine; from pyengine.generate import Chat\n"
        "with pyengine.Model.open(pyengine.demo_model_path()) as model:\n"
        "    print([*Chat(model, max_tokens=4).send('What is 2 + 3?')])\n"
        "print(pyengine.plan('r1-8b-card').advice)",
    ],
}
# Runs what follows, and ends with 77 if anything in it touches a socket.
_AUDIT = """
import os, runpy, sys
def hook(event, args):
    if event.startswith(("socket.", "urllib.", "http.")):
        os.write(2, f"audit: {event} {args!r}\\n".encode())
        os._exit(77)
sys.addaudithook(hook)
kind, what, *sys.argv[1:] = sys.argv[1:]
if kind == "-m":
    runpy.run_module(what, run_name="__main__", alter_sys=True)
else:
    exec(what)
"""


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": PATH} | more


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed (the extra hub)")
    with FakeHub() as fake:
        fake.repositories["org/demo"] = Repository({"demo-Q4_K_M.gguf": Path(DEMO).read_bytes()})
        yield fake


def arguments_of(call: str, out: Path) -> list[str]:
    return [argument.replace("{out}", str(out)) for argument in CALLS[call]]


def finished(command: list[str], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, env=env, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300, check=False
    )


def audited(arguments: list[str], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return finished([sys.executable, "-c", _AUDIT, *arguments], env)


@pytest.mark.parametrize("call", CALLS)
def test_no_socket_is_made_without_a_name(call: str, tmp_path: Path) -> None:
    done = audited(arguments_of(call, tmp_path), environment())
    assert "audit:" not in done.stderr, done.stderr
    assert done.returncode == (1 if "not there" in call else 0), done.stderr


def test_the_audit_sees_a_name(hub: FakeHub, tmp_path: Path) -> None:
    done = audited(["-m", "pyengine.cli.run", "hf:org/demo", "1 + 1?"], environment(**hub.environment(tmp_path)))
    assert done.returncode == 77
    assert "audit: socket." in done.stderr


def network_calls(arguments: list[str], log: Path, env: dict[str, str]) -> list[str]:
    """The lines of strace that make an internet socket or connect any."""
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("strace is not installed")
    traced = [strace, "-f", "--seccomp-bpf", "-qq", "-e", "trace=connect,socket", "-e", "signal=none", "-o", str(log)]
    done = finished([*traced, sys.executable, *arguments], env)
    if "PTRACE" in done.stderr or "ptrace" in done.stderr:
        pytest.skip(f"strace may not trace here: {done.stderr[:200]}")
    assert done.returncode in (0, 1), done.stderr
    lines = log.read_text().splitlines()
    return [line for line in lines if re.search(r"connect\(|socket\((?!AF_UNIX|AF_NETLINK)", line)]


@pytest.mark.parametrize("call", ["run", "run, of a file that is not there", "plan of a file", "convert", "Python"])
def test_the_kernel_sees_no_connection_without_a_name(call: str, tmp_path: Path) -> None:
    assert network_calls(arguments_of(call, tmp_path), tmp_path / "trace", environment()) == []


def test_the_kernel_sees_the_connection_of_a_name(hub: FakeHub, tmp_path: Path) -> None:
    arguments = ["-m", "pyengine.cli.plan", "hf:org/demo", "--no-speed"]
    found = network_calls(arguments, tmp_path / "trace", environment(**hub.environment(tmp_path / "home")))
    assert any("connect(" in line and f"htons({hub.port})" in line for line in found), found
