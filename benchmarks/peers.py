"""The engines that pyengine is measured against: where they are, how they are started, what is asked of them.

Every engine is a program that opens a model and then answers commands on its standard input with one line of JSON
(benchmarks/peer.cc for llama.cpp and ik_llama.cpp, benchmarks/ours.py for pyengine):

    (at start)              {"open": s, "first": s, "finite": true}   model and context ready; logits of a first token
    prefill N               {"seconds": [s]}             N tokens into the empty context, logits of the last
    decode N DEPTH [STATE]  {"seconds": [s, ...]}        N steps of one token after DEPTH tokens, each with its logits
    logits N IDS OUT        {"rows": N, "vocab": V}      float32 logits of N ids (int32 in IDS), appended to OUT

Before a decode the context is brought to DEPTH tokens by a prefill (peers: or from the file STATE, written the first
time) and one step is made and taken back; neither is timed.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
INSTALL = """llama-cpp-python is not installed for {python}. Build it with this machine's instructions:

    CMAKE_ARGS="-DGGML_NATIVE=ON" {python} -m pip install llama-cpp-python=={version}

or name a build of llama.cpp with --llama FOLDER, or leave llama.cpp out with --only."""
PINNED = "0.3.36"


@dataclass(frozen=True)
class Peer:
    """A built peer: its headers, its shared libraries, and what it calls itself."""

    name: str
    include: tuple[Path, ...]
    libraries: tuple[Path, ...]
    version: str

    @property
    def ik(self) -> bool:
        return self.name == "ik"

    def driver(self) -> Path:
        """benchmarks/peer.cc compiled against this peer; compiled again when it or the peer changed."""
        source = HERE / "peer.cc"
        key = hashlib.sha256(source.read_bytes() + repr((self, os.path.getmtime(self.libraries[0]))).encode())
        out = Path(tempfile.gettempdir()) / f"pyengine-peer-{self.name}-{key.hexdigest()[:16]}"
        if not out.exists():
            command = ["g++", "-O2", "-std=c++20", *(f"-I{p}" for p in self.include), *(["-DPEER_IK"] * self.ik)]
            command += [str(source), "-o", f"{out}.part", *map(str, self.libraries)]
            for folder in sorted({str(p.parent) for p in self.libraries}):
                command += [f"-Wl,-rpath,{folder}", f"-Wl,-rpath-link,{folder}"]
            subprocess.run(command, check=True)
            os.replace(f"{out}.part", out)
        return out


def _commit(source: Path) -> str:
    run = subprocess.run(["git", "-C", str(source), "rev-parse", "--short=9", "HEAD"], capture_output=True, text=True)
    return run.stdout.strip() if run.returncode == 0 else "unknown commit"


def _libraries(folder: Path) -> tuple[Path, ...]:
    """libllama and the libggml parts under a folder."""
    found = {p.name: p for p in sorted(folder.rglob("lib*.so")) if p.name == "libllama.so" or "ggml" in p.name}
    if "libllama.so" not in found:
        raise SystemExit(
            f"{folder} holds no libllama.so; expected a folder where llama.cpp was built (shared libraries)"
        )
    return (found.pop("libllama.so"), *found.values())


def built(name: str, folder: Path) -> Peer:
    """A peer from the folder it was built in with CMake."""
    cache = folder / "CMakeCache.txt"
    if not cache.is_file():
        raise SystemExit(f"{folder} has no CMakeCache.txt; expected a build folder of {name}")
    entries = dict(line.split("=", 1) for line in cache.read_text().splitlines() if "=" in line and line[0] not in "#/")
    source = Path(entries["CMAKE_HOME_DIRECTORY:INTERNAL"])
    flags = [k.partition(":")[0] for k, v in entries.items() if k.startswith(("GGML_NATIVE", "GGML_AVX")) and v == "ON"]
    version = f"{_commit(source)}, {' '.join(flags)}"
    return Peer(name, (source / "include", source / "ggml" / "include"), _libraries(folder), version)


def installed(python: str) -> Peer:
    """llama.cpp as the installed llama-cpp-python brings it."""
    code = "import importlib.util as u; print(u.find_spec('llama_cpp').origin)"
    run = subprocess.run([python, "-c", code], capture_output=True, text=True)
    if run.returncode != 0:
        raise SystemExit(INSTALL.format(python=python, version=PINNED))
    package = Path(run.stdout.strip()).parent
    code = "from importlib.metadata import version; print(version('llama-cpp-python'))"
    version = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    return Peer("llama", (package / "include",), _libraries(package / "lib"), f"llama-cpp-python {version}")


@dataclass(frozen=True)
class Engine:
    """One way to run one engine. ``family`` is pyengine, llama or ik; variants of a family compete for its best."""

    name: str
    family: str
    program: tuple[str, ...]
    options: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)

    def start(self, model: Path, threads: int, context: int, kv: str) -> Running:
        settings = (f"threads={threads}", f"context={context}", f"kv={kv}", *self.options)
        return Running([*self.program, str(model), *settings], {**os.environ, **self.environment})


def engines(llama: Peer | None, ik: Peer | None, kv: str, only: Iterable[str] = ("*",), isa: str = "") -> list[Engine]:
    """Every variant whose name matches a pattern; a quantised V cache exists in the peers with flash attention only.

    llama.cpp repacks unless told otherwise (+norepack), ik_llama.cpp only if told (+rtr); +fa: flash attention.
    """
    all_ = [
        Engine(
            "pyengine", "pyengine", (sys.executable, str(HERE / "ours.py")), (), {"PYENGINE_ISA": isa} if isa else {}
        )
    ]
    for peer in (llama, ik):
        if peer is None:
            continue
        for repack in (1, 0):
            for flash in (1, 0):
                if kv == "q8_0" and not flash:
                    continue
                extra = ("+rtr" if repack else "") if peer.ik else ("" if repack else "+norepack")
                name = peer.name + extra + ("+fa" if flash else "")
                if any(fnmatch.fnmatch(name, p) for p in only):
                    program = (str(peer.driver()),)
                    all_.append(Engine(name, peer.name, program, (f"flash={flash}", f"repack={repack}")))
    return [e for e in all_ if any(fnmatch.fnmatch(e.name, p) for p in only)]


class Running:
    """A started engine."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, env=environment
        )
        self.peak_anonymous = 0  # bytes: RssAnon and swap, sampled
        self._ended = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()
        self.load: dict[str, Any] = self._answer()
        if not self.load["finite"]:
            raise SystemExit(f"{command[0]} finds NaN or infinity in the logits of {command[1]}")

    def _watch(self) -> None:
        path = Path(f"/proc/{self._process.pid}/status")
        while not self._ended.wait(0.05):
            try:
                lines = path.read_text().splitlines()
            except OSError:
                return
            used = sum(int(x.split()[1]) << 10 for x in lines if x.startswith(("RssAnon:", "VmSwap:")))
            self.peak_anonymous = max(self.peak_anonymous, used)

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"{self._process.args} ended with {self._process.wait()} instead of answering")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, *words: object) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(" ".join(map(str, words)) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        self._ended.set()
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
