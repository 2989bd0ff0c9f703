"""Models by name, with the real library and a hub on the loopback interface: what arrives, breaks, and is said."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import pyengine
from pyengine.errors import EngineError, FormatError, InvalidArgument, UnsupportedError
from pyengine.gguf_file import GgufFile
from pyengine.hub import RemoteFile, choices, choose, parse
from tests.cli.fake_hub import COMMIT, TOKEN, FakeHub, Repository
from tests.cli.terminal import Terminal
from tests.support import ROOT

pytest.importorskip("huggingface_hub", reason="huggingface_hub is not installed (the extra hub)")

DEMO = pyengine.demo_model_path().read_bytes()
REPO = "org/demo-GGUF"
NAME = f"hf:{REPO}"
ASK = ("What is 27 + 58?", "--temp", "0")


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with FakeHub() as fake:
        fake.repositories[REPO] = Repository({"README.md": b"a model", "demo-Q4_K_M.gguf": DEMO})
        yield fake


class Runner:
    """Runs commands against a hub, with a cache of their own."""

    def __init__(self, hub: FakeHub, home: Path) -> None:
        self.hub, self.home = hub, home
        self.env = hub.environment(home)

    def __call__(self, command: str, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
        call = [sys.executable, "-m", f"pyengine.cli.{command}", *args]
        options: dict[str, Any] = {"capture_output": True, "text": True, "stdin": subprocess.DEVNULL, "timeout": 120}
        return subprocess.run(call, env=self.env | env, cwd=ROOT, check=False, **options)

    def start(self, command: str, *args: str) -> subprocess.Popen[str]:
        call = [sys.executable, "-m", f"pyengine.cli.{command}", *args]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            call, env=self.env, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True
        )

    def fetch(self, *names: str, **env: str) -> subprocess.CompletedProcess[str]:
        """For each name a line: the path, or the code and the message of the error."""
        code = (
            "import sys, pyengine.hub as h, pyengine.errors as e\n"
            "for name in sys.argv[1:]:\n"
            "    try: print(h.fetch(name, note=lambda s: print(s, file=sys.stderr)))\n"
            "    except e.EngineError as error: print(error.code, error.message)\n"
        )
        call = [sys.executable, "-c", code, *(names or (NAME,))]
        return subprocess.run(
            call, env=self.env | env, cwd=ROOT, check=True, capture_output=True, text=True, timeout=120
        )

    def files(self) -> list[str]:
        """What the cache holds, locks aside."""
        root = self.home / "hub"
        return sorted(
            str(path.relative_to(root)) for path in root.rglob("*") if not path.is_dir() and ".locks" not in path.parts
        )


@pytest.fixture
def run(hub: FakeHub, tmp_path: Path) -> Runner:
    return Runner(hub, tmp_path / "home")


def check_failure(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    """One sentence, no traceback, nothing on stdout."""
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.strip().splitlines() if not line.startswith("note: ")]
    assert len(lines) == 1, done.stderr
    for word in words:
        assert word in lines[0], lines[0]


# ---- downloading ----


def test_a_model_by_name_answers_and_the_second_time_without_the_hub(hub: FakeHub, run: Runner) -> None:
    local = run("run", str(pyengine.demo_model_path()), *ASK)
    first = run("run", NAME, *ASK)
    assert (first.returncode, first.stdout) == (0, local.stdout), first.stderr
    assert "downloading demo-Q4_K_M.gguf, 2.83 MB" in first.stderr
    paths = [path for _, path, _ in hub.requests]
    # Nothing else: no telemetry, no search for updates.
    assert [re.sub(r"/[0-9a-f]{40}/", "/COMMIT/", p) for p in paths] == [
        f"/api/models/{REPO}?blobs=true",
        f"/{REPO}/resolve/COMMIT/demo-Q4_K_M.gguf",
        f"/cdn/{REPO}/demo-Q4_K_M.gguf",
    ]
    again = run("run", NAME, *ASK)
    assert (again.stdout, again.stderr) == (local.stdout, "")
    names = (NAME, f"{NAME}:q4_k_m", f"{NAME}@main:Q4-K-M", f"{NAME}:demo-Q4_K_M.gguf", f"{NAME}@{COMMIT}")
    [path] = set(run.fetch(*names).stdout.splitlines())
    assert Path(path).read_bytes() == DEMO
    assert len(hub.requests) == 3


def test_the_library_finds_what_was_downloaded(run: Runner) -> None:
    path = run.fetch().stdout.strip()
    code = (
        "import huggingface_hub as h, sys; info = h.scan_cache_dir(); "
        "print(h.try_to_load_from_cache(sys.argv[1], 'demo-Q4_K_M.gguf')); "
        "print(len(info.warnings), info.size_on_disk, [r.repo_id for r in info.repos], "
        "h.hf_hub_download(sys.argv[1], 'demo-Q4_K_M.gguf', local_files_only=True))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, REPO], env=run.env, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.splitlines() == [path, f"0 {len(DEMO)} ['{REPO}'] {path}"]
    assert Path(path).read_bytes() == DEMO


def test_a_download_that_breaks_off_goes_on_where_it_was(hub: FakeHub, run: Runner) -> None:
    hub.cuts = [1_000_000, 500_000, 0, 700_000]
    done = run.fetch()
    assert Path(done.stdout.strip()).read_bytes() == DEMO
    starts = [int(re.findall(r"\d+", r)[0]) for r in hub.ranges()]
    assert starts == [0, 1_000_000, 1_500_000, 1_500_000, 2_200_000]
    assert hub.sent == len(DEMO)  # not a byte twice


def test_a_killed_download_goes_on_in_the_next_process(hub: FakeHub, run: Runner) -> None:
    hub.stall_after = 1_048_576
    process = run.start("run", NAME, *ASK)
    assert hub.stalled.wait(60)
    time.sleep(0.5)
    process.kill()
    process.communicate()
    [unfinished] = [name for name in run.files() if name.endswith(".incomplete")]
    size = (run.home / "hub" / unfinished).stat().st_size
    assert 0 < size <= 1_048_576
    assert f"{NAME} (unfinished)" in run("run", "list").stdout
    hub.stall_after = None
    hub.go.set()
    done = run.fetch()
    assert Path(done.stdout.strip()).read_bytes() == DEMO
    assert hub.ranges()[-1] == f"bytes={size}-"
    assert not [name for name in run.files() if name.endswith(".incomplete")]


def test_ctrl_c_stops_a_download_with_a_word_about_going_on(hub: FakeHub, run: Runner) -> None:
    hub.stall_after = 1_048_576
    process = run.start("run", NAME, *ASK)
    assert hub.stalled.wait(60)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, "")
    assert "the download was stopped; the same command goes on with it\npyengine-run: interrupted\n" in err
    assert "Traceback" not in err


def test_progress_is_shown_on_a_terminal(hub: FakeHub, run: Runner) -> None:
    hub.stall_after = 1_048_576
    command = [sys.executable, "-m", "pyengine.cli.run", NAME, *ASK]
    with Terminal(command, run.env) as terminal:
        terminal.wait_for("downloading demo-Q4_K_M.gguf: ", 60)
        terminal.wait_for(" of 2.83 MB")
        hub.go.set()
        assert terminal.exit_code(60) == 0
    assert "27 + 58 = 85" in terminal.seen


def test_a_server_without_ranges_sends_all_again(hub: FakeHub, run: Runner) -> None:
    hub.cuts, hub.knows_ranges = [1_000_000], False
    assert Path(run.fetch().stdout.strip()).read_bytes() == DEMO
    assert hub.sent == 1_000_000 + len(DEMO)


def test_a_busy_server_is_asked_again(hub: FakeHub, run: Runner) -> None:
    hub.statuses = [503, 429, 500]
    assert Path(run.fetch().stdout.strip()).read_bytes() == DEMO


def test_a_damaged_download_is_no_model(hub: FakeHub, run: Runner) -> None:
    """A byte of a file wrong, wherever it is; also of one that is so small that the hub hashes it as git does."""
    files = {"demo-Q4_K_M.gguf": DEMO}
    for offset in (0, 1_500_000, len(DEMO) - 1):
        hub.repositories[f"org/{offset}"] = Repository(files, damage=offset)
        hub.repositories[f"git/{offset}"] = Repository(files, damage=offset, small=tuple(files))
    names = [f"hf:{repo}" for repo in hub.repositories if repo != REPO]
    lines = run.fetch(*names).stdout.splitlines()
    assert len(lines) == 6
    for line in lines:
        assert line.startswith("damaged_download demo-Q4_K_M.gguf was damaged on the way: its hash is "), line
    assert run.files() == []
    for repo in ("org/0", "git/0"):
        hub.repositories[repo].damage = None
    for line in run.fetch("hf:org/0", "hf:git/0").stdout.splitlines():
        assert Path(line).read_bytes() == DEMO


def test_a_wrong_size_is_an_error(hub: FakeHub, run: Runner) -> None:
    for name, size in (("short", len(DEMO) - 1), ("long", len(DEMO) + 1)):
        hub.repositories[f"org/{name}"] = Repository({"m.gguf": DEMO}, announced={"m.gguf": {"size": size}})
    short, long = run.fetch("hf:org/short", "hf:org/long").stdout.splitlines()
    assert short == f"damaged_download m.gguf is longer than the {len(DEMO) - 1} bytes that the hub announced"
    assert long == f"damaged_download m.gguf ends after {len(DEMO)} of the {len(DEMO) + 1} bytes that the hub announced"
    assert not [name for name in run.files() if "snapshots" in name]


def test_two_processes_download_a_model_once(hub: FakeHub, run: Runner) -> None:
    hub.stall_after = 100_000
    processes = [run.start("run", NAME, *ASK) for _ in range(2)]
    assert hub.stalled.wait(60)
    hub.go.set()
    answers = [process.communicate(timeout=120) for process in processes]
    assert [out for out, _ in answers] == ["27 + 58 = 85\n"] * 2, answers
    assert hub.sent == len(DEMO)


def test_too_little_space_is_said_before_anything_is_sent(hub: FakeHub, run: Runner) -> None:
    hub.repositories[REPO].announced["demo-Q4_K_M.gguf"] = {"size": 10**15}
    check_failure(run("run", NAME, *ASK), 1, "free; the download needs 1000 TB", "HF_HUB_CACHE")
    assert hub.contents() == []


def test_a_disk_that_refuses_is_an_error_and_the_rest_comes_later(hub: FakeHub, run: Runner) -> None:
    import resource

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    call = [sys.executable, "-m", "pyengine.cli.run", NAME, *ASK]
    options: dict[str, Any] = {"capture_output": True, "text": True, "stdin": subprocess.DEVNULL, "timeout": 120}
    done = subprocess.run(call, env=run.env, cwd=ROOT, preexec_fn=limited, check=False, **options)
    check_failure(done, 1, "cannot write to", "File too large")
    assert Path(run.fetch().stdout.strip()).read_bytes() == DEMO
    assert hub.sent < len(DEMO) + (1 << 21)
    blocked = run("run", NAME, *ASK, HF_HUB_CACHE="/dev/null/cache")
    check_failure(blocked, 1, "/dev/null")


# ---- split files ----


def split_demo(folder: Path) -> dict[str, bytes]:
    command = [sys.executable, "-m", "pyengine_convert.cli", str(pyengine.demo_model_path()), "--type", "q8_0"]
    env = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tools' / 'convert'}"}
    out = ["-o", str(folder / "demo-Q8_0.gguf"), "--split-size", "1M"]
    subprocess.run([*command, *out], env=env, check=True, capture_output=True, timeout=120)
    return {f"Q8_0/{path.name}": path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_split_model_comes_whole(hub: FakeHub, run: Runner, tmp_path: Path) -> None:
    (tmp_path / "parts").mkdir()
    parts = split_demo(tmp_path / "parts")
    assert len(parts) >= 3
    hub.repositories[REPO] = Repository(parts | {"mmproj-model-f16.gguf": b"x", "imatrix.gguf": b"x"})
    plan = run("plan", NAME, "--no-speed", "--json")
    assert json.loads(plan.stdout)["rows"][0]["quantisation"] == "this file", plan.stderr
    hub.sent = 0
    hub.cuts = [100_000]
    done = run("run", f"{NAME}:Q8_0", *ASK)
    assert done.stdout == run("run", str(pyengine.demo_model_path()), *ASK).stdout
    assert hub.sent == sum(map(len, parts.values()))
    assert "Q8_0" in run("run", "list").stdout
    assert run("run", "rm", "--yes", NAME).returncode == 0
    assert run.files() == []
    hub.repositories[REPO] = Repository(dict(list(parts.items())[:-1]))
    check_failure(run("run", NAME, *ASK), 1, f"has {len(parts) - 1} of the parts of Q8_0/demo-Q8_0-00001-of")


# ---- choosing ----


def files(*names: str) -> list[RemoteFile]:
    return [RemoteFile(name, 1000, "0" * 64) for name in names]


USUAL = files(
    "config.json",
    "m-Q2_K.gguf",
    "m-Q4_K_M.gguf",
    "m-Q4_K_S.gguf",
    "m-IQ4_XS.gguf",
    "m-Q8_0.gguf",
    "BF16/m-BF16-00001-of-00002.gguf",
    "BF16/m-BF16-00002-of-00002.gguf",
    "m-UD-Q4_K_XL.gguf",
    "mmproj-F16.gguf",
    "m.imatrix.gguf",
    "m.q5_k_m.gguf",
)


@pytest.mark.parametrize(
    ("what", "found", "path"),
    [
        ("", USUAL, "m-Q4_K_M.gguf"),
        (":Q4_K_M", USUAL, "m-Q4_K_M.gguf"),
        (":q4_k_m", USUAL, "m-Q4_K_M.gguf"),
        (":q8_0", USUAL, "m-Q8_0.gguf"),
        (":Q5_K_M", USUAL, "m.q5_k_m.gguf"),
        (":bf16", USUAL, "BF16/m-BF16-00001-of-00002.gguf"),
        (":Q4_K_XL", USUAL, "m-UD-Q4_K_XL.gguf"),
        (":UD-Q4_K_XL", USUAL, "m-UD-Q4_K_XL.gguf"),
        (":m-Q2_K.gguf", USUAL, "m-Q2_K.gguf"),
        (":M-q2_k.GGUF", USUAL, "m-Q2_K.gguf"),
        (":m-BF16-00002-of-00002.gguf", USUAL, "BF16/m-BF16-00001-of-00002.gguf"),
        ("", files("m-Q8_0.gguf", "m-Q5_K_M.gguf", "m-Q2_K.gguf"), "m-Q5_K_M.gguf"),
        ("", files("m-IQ4_XS.gguf", "m-Q4_0.gguf"), "m-IQ4_XS.gguf"),
        ("", files("m-Q3_K_M.gguf", "m-Q8_0.gguf"), "m-Q8_0.gguf"),
        ("", files("model.gguf"), "model.gguf"),
        ("", files("m-IQ1_S.gguf"), "m-IQ1_S.gguf"),
        (":7b", files("a-7b-Q4_K_M.gguf", "a-13b-Q4_K_M.gguf"), "a-7b-Q4_K_M.gguf"),
    ],
)
def test_the_file_that_a_name_means(what: str, found: list[RemoteFile], path: str) -> None:
    choice, remark = choose(parse(f"hf:org/repo{what}"), choices(found))
    assert choice.path == path
    assert bool(remark) == (not what and "Q4_K_M" not in path)
    assert not remark or path in remark or choice.quantisation in remark


@pytest.mark.parametrize(
    ("what", "found", "error", "words"),
    [
        (":Q6_K", USUAL, InvalidArgument, "no GGUF file of hf:org/repo fits 'Q6_K'; there are :BF16 (2 kB); :IQ4_XS"),
        (":Q4", files("a-Q4_0.gguf", "b-Q4_0.gguf"), InvalidArgument, "2 files of hf:org/repo fit 'Q4'; say which"),
        (":Q4_0", files("a-Q4_0.gguf", "b-Q4_0.gguf"), InvalidArgument, "2 files of hf:org/repo fit 'Q4_0'; say which"),
        ("", files("a-Q4_K_M.gguf", "b-Q4_K_M.gguf"), InvalidArgument, "say which :a-Q4_K_M.gguf (1 kB); :b-Q4_K_M"),
        ("", files("a.gguf", "b.gguf"), InvalidArgument, "say which"),
        ("", files("model.safetensors"), UnsupportedError, "holds no GGUF file"),
        ("", files("mmproj-F16.gguf"), UnsupportedError, "holds no GGUF file"),
        ("", files("m-Q4_0-00001-of-00003.gguf", "m-Q4_0-00003-of-00003.gguf"), FormatError, "has 2 of the parts"),
    ],
)
def test_a_name_that_means_nothing_or_several_is_an_error(
    what: str, found: list[RemoteFile], error: type[EngineError], words: str
) -> None:
    with pytest.raises(error) as raised:
        choose(parse(f"hf:org/repo{what}"), choices(found))
    assert words in raised.value.message


@pytest.mark.parametrize(
    "name",
    [
        *("hf:", "hf:org", "hf:org/", "hf:/repo", "hf:org/repo/file.gguf", "hf:org/repo@", "hf:org/repo:"),
        *("hf:../repo", "hf:org/..", "hf:org/a--b", "hf:org/repo@../x", "hf:org/repo@/x", "hf:org/repo@a/../b"),
        *("hf: org/repo", "hf:o/r\n"),
        *("hf:https://huggingface.co/org/repo", "hf:org/repo@a b", "hf:örg/repo"),
    ],
)
def test_a_malformed_name_is_refused_with_an_example(name: str) -> None:
    with pytest.raises(InvalidArgument, match="as in hf:org/repo:Q4_K_M"):
        parse(name)


# ---- what the hub refuses ----


@pytest.mark.parametrize("status", [401, 403])
def test_a_gated_repository_needs_the_token_which_goes_nowhere_else(hub: FakeHub, run: Runner, status: int) -> None:
    hub.repositories[REPO].gated = status
    check_failure(run("run", NAME, *ASK), 1, f"{REPO} is gated: accept its terms at http://127.0.0.1", "hf auth login")
    check_failure(run("run", NAME, *ASK, HF_TOKEN="hf_wrong"), 1, "gated")
    assert run.files() == []
    run.fetch(HF_TOKEN=TOKEN)
    assert any(headers.get("authorization") == f"Bearer {TOKEN}" for _, headers in hub.contents())
    told = [headers.get("authorization") for _, path, headers in hub.requests if path.startswith("/cdn/")]
    assert told == [None]


def test_what_is_not_there_is_said(hub: FakeHub, run: Runner) -> None:
    check_failure(run("run", "hf:org/nothing", *ASK), 1, "knows no repository org/nothing", "private")
    missing = run("run", f"{NAME}:Q8_0", *ASK)
    check_failure(missing, 2, "no GGUF file of hf:org/demo-GGUF fits 'Q8_0'; there are :Q4_K_M (2.83 MB)")
    hub.repositories["org/tensors"] = Repository({"model.safetensors": b"x", "config.json": b"{}"})
    revision, name, tensors = run.fetch(f"{NAME}@v9", "hf:org", "hf:org/tensors").stdout.splitlines()
    assert revision == f"unknown_revision {REPO} has no revision 'v9'"
    assert name.startswith("bad_name 'hf:org' is no name of a model")
    assert tensors.startswith("no_gguf hf:org/tensors holds no GGUF file")
    assert hub.contents() == []


def test_an_answer_that_is_none_is_one_sentence(hub: FakeHub, run: Runner) -> None:
    cases = [
        (200, b"<html>log in to the hotel's network</html>", "is no listing of a repository"),
        (200, b"[]", "is no listing of a repository"),
        (200, b'{"id": "org/demo-GGUF"}', "is no listing of a repository"),
        (200, b'{"id": 5, "sha": 7, "siblings": [3]}', "is no listing of a repository"),
        (200, b'{"id": "x", "sha": "../../etc", "siblings": []}', "the commit '../../etc'"),
        (403, b"blocked by the administrator", "refuses hf:org/5 (403"),
        (500, b"", "answered 500"),
        (418, b"", "answered 418"),
        (200, b'{"id": "x", "sha": "' + COMMIT.encode() + b'", "siblings": [{"rfilename": null}]}', "is no listing"),
    ]
    for number, (status, body, _) in enumerate(cases):
        hub.repositories[f"org/{number}"] = Repository({}, listing=(status, body))
    lines = run.fetch(*(f"hf:org/{number}" for number in range(len(cases)))).stdout.splitlines()
    for line, (_, _, words) in zip(lines, cases, strict=True):
        assert words in line
    check_failure(run("run", "hf:org/0", *ASK), 1, "is there a proxy or a login page in between?")


def test_a_hostile_listing_reaches_nothing_outside_the_cache(hub: FakeHub, run: Runner) -> None:
    paths = ("../../../../escape.gguf", "/absolute.gguf", "a\\..\\b.gguf", "c:d.gguf", "ok.gguf")
    hub.repositories[REPO] = Repository(dict.fromkeys(paths, DEMO))
    hub.repositories[REPO].announced["ok.gguf"] = {"lfs": {"sha256": "../../../../evil", "size": 1, "pointerSize": 1}}
    check_failure(run("run", NAME, *ASK), 1, "holds no GGUF file")
    del hub.repositories[REPO].announced["ok.gguf"]
    assert Path(run.fetch().stdout.strip()).read_bytes() == DEMO
    assert not list(run.home.parent.rglob("*escape*"))


# ---- without a network ----


def test_offline_the_cached_copy_is_used_and_nothing_is_asked(hub: FakeHub, run: Runner) -> None:
    check_failure(run("run", NAME, *ASK, HF_HUB_OFFLINE="1"), 1, "is not in the cache", "HF_HUB_OFFLINE")
    hub.repositories[REPO] = Repository({"demo-Q8_0.gguf": DEMO})
    assert run("run", NAME, *ASK).returncode == 0
    asked = len(hub.requests)
    done = run("run", NAME, *ASK, HF_HUB_OFFLINE="1")
    assert (done.returncode, done.stdout) == (0, "27 + 58 = 85\n")
    assert "taken from the cache" in done.stderr
    assert run("plan", NAME, "--no-speed", HF_HUB_OFFLINE="1").returncode == 0
    check_failure(run("run", f"{NAME}:Q4_0", *ASK, HF_HUB_OFFLINE="1"), 1, "HF_HUB_OFFLINE")
    assert len(hub.requests) == asked


def test_an_unreachable_hub_is_one_sentence_and_the_cached_copy_serves(hub: FakeHub, run: Runner) -> None:
    hub.repositories[REPO] = Repository({"demo-Q8_0.gguf": DEMO})
    nobody = {"HF_ENDPOINT": "http://127.0.0.1:9"}  # discard: nothing listens
    check_failure(run("run", NAME, *ASK, **nobody), 1, "127.0.0.1:9 cannot be reached", "is not in the cache")
    check_failure(run("plan", NAME, "--no-speed", **nobody), 1, "127.0.0.1:9 cannot be reached")
    check_failure(run("run", NAME, *ASK, HF_ENDPOINT="http://nowhere.invalid"), 1, "nowhere.invalid cannot be reached")
    assert run("run", NAME, *ASK).returncode == 0
    done = run("run", NAME, *ASK, **nobody)
    assert (done.returncode, done.stdout) == (0, "27 + 58 = 85\n")
    assert "the hub was not reached" in done.stderr


def test_without_the_library_the_message_says_how_to_install_it(run: Runner) -> None:
    for call in ("run", "plan"):
        code = f"import sys; sys.modules['huggingface_hub'] = None; import pyengine.cli.{call} as c; sys.exit(c.main())"
        command = [sys.executable, "-c", code, NAME, *ASK[: call == "run"]]
        done = subprocess.run(command, env=run.env, cwd=ROOT, check=False, capture_output=True, text=True, timeout=60)
        check_failure(done, 1, "pip install 'pyengine[hub]'")


# ---- planning before the download ----


def without_source(text: str) -> dict[str, Any]:
    plan: dict[str, Any] = json.loads(text)
    return {key: plan[key] for key in ("shape", "rows", "cells", "contexts")}


def test_a_plan_reads_only_the_header(hub: FakeHub, run: Runner) -> None:
    padded = DEMO + bytes(40 << 20)  # a large file, as far as the hub says
    hub.repositories[REPO] = Repository({"demo-Q4_K_M.gguf": padded})
    options = ("--ram", "16G", "--json")
    local = run("plan", str(pyengine.demo_model_path()), *options)
    done = run("plan", NAME, *options)
    assert without_source(done.stdout) == without_source(local.stdout), done.stderr
    assert "note: demo-Q4_K_M.gguf, 44.8 MB: 1.05 MB of it were read" in done.stderr
    assert hub.sent == 1 << 20
    assert run.files() == []
    hub.knows_ranges, hub.sent = False, 0
    assert without_source(run("plan", NAME, *options).stdout) == without_source(local.stdout)
    assert hub.sent < 12 << 20  # it hung up
    code = f"import json, pyengine; print(pyengine.plan({NAME!r}, ram=2**34).rows[0].weights)"
    done = subprocess.run([sys.executable, "-c", code], env=run.env, capture_output=True, text=True, check=True)
    assert int(done.stdout) == json.loads(local.stdout)["rows"][0]["weights"]


def test_a_long_header_is_read_in_steps(hub: FakeHub, run: Runner) -> None:
    code = (
        "import sys, pyengine, pyengine.hub as h; h._HEADER_BYTES = (100, 5000, 20000, 1 << 20)\n"
        "print(pyengine.plan(sys.argv[1], ram=2**34).rows[0].weights)"
    )
    call = [sys.executable, "-c", code, NAME]
    done = subprocess.run(call, env=run.env, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    assert int(done.stdout) == pyengine.plan(pyengine.demo_model_path(), ram=2**34).rows[0].weights
    assert hub.ranges() == ["bytes=0-99", "bytes=100-4999", "bytes=5000-19999", "bytes=20000-1048575"]


def test_the_reader_says_wherever_a_header_is_cut_that_it_is_cut(tmp_path: Path) -> None:
    """What the steps rely on."""
    path, rng = tmp_path / "cut.gguf", random.Random(1)
    whole = 1 << 20
    codes = {}
    for size in sorted({*range(1, 400), *(rng.randrange(400, whole) for _ in range(200))}):
        path.write_bytes(DEMO[:size])
        with pytest.raises(EngineError) as raised:
            GgufFile.open(path, load="header")
        codes[size] = raised.value.code
    assert set(codes.values()) == {"truncated_header", "truncated_data"}
    last = max(size for size, code in codes.items() if code == "truncated_header")
    assert all(code == "truncated_header" for size, code in codes.items() if size <= last)


def test_a_plan_without_a_gguf_file_is_made_from_the_config(hub: FakeHub, run: Runner) -> None:
    config = {
        **{"architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336},
        **{"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8},
        **{"vocab_size": 128256, "max_position_embeddings": 131072},
    }
    hub.repositories["org/tensors"] = Repository(
        {"model.safetensors": b"x" * 5000, "config.json": json.dumps(config).encode()}
    )
    done = run("plan", "hf:org/tensors", "--ram", "16G", "--json")
    assert json.loads(done.stdout)["shape"]["layers"] == 32, done.stderr
    assert json.loads(done.stdout)["shape"]["name"] == "tensors"
    assert "holds no GGUF file: this is from its config.json" in done.stderr
    assert hub.sent == len(json.dumps(config))


def test_a_damaged_header_is_the_readers_error(hub: FakeHub, run: Runner) -> None:
    hub.repositories[REPO].damage = 0
    done = run("plan", NAME, "--no-speed")
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1
    assert "Traceback" not in done.stderr


# ---- list, show, rm ----


def test_list_show_and_rm_speak_of_the_same_models(hub: FakeHub, run: Runner) -> None:
    empty = run("run", "list")
    assert (empty.returncode, empty.stdout) == (0, "")
    assert "no models in" in empty.stderr
    other = bytearray(DEMO)
    other[-1] ^= 1
    hub.repositories[REPO] = Repository({"demo-Q4_K_M.gguf": DEMO, "demo-Q8_0.gguf": bytes(other)})
    hub.repositories["org/second"] = Repository({"model.gguf": DEMO})
    run.fetch(NAME, f"{NAME}:Q8_0", f"{NAME}@v1", "hf:org/second")
    listed = run("run", "list").stdout
    names = [line.split()[0] for line in listed.splitlines()]
    assert names == [NAME + ":Q4_K_M", NAME + ":Q8_0", "hf:org/second:model.gguf"]
    assert listed.count("2.83 MB") == 3
    facts = json.loads(run("run", "list", "--json").stdout)
    assert [entry["size"] for entry in facts] == [len(DEMO)] * 3
    assert facts[0]["refs"] == ["main", "v1"]
    paths = run.fetch(*names, HF_HUB_OFFLINE="1").stdout.splitlines()  # what is listed can be asked for
    assert paths == [entry["path"] for entry in facts]
    shown = run("run", "show", NAME, "--check")
    assert shown.returncode == 0
    assert shown.stdout.count("architecture  qwen3") == 2
    assert shown.stdout.count("hash          right") == 2
    blob = Path(facts[1]["path"]).resolve()
    blob.write_bytes(DEMO)
    damaged = run("run", "show", NAME + ":Q8_0", "--check", "--json")
    assert (damaged.returncode, json.loads(damaged.stdout)[0]["hash"]) == (1, "wrong")
    check_failure(run("run", "show", "hf:org/nothing"), 2, "hf:org/nothing is not in the cache", NAME + ":Q4_K_M")


def test_rm_removes_what_is_named_and_nothing_else(hub: FakeHub, run: Runner) -> None:
    hub.repositories[REPO] = Repository({"demo-Q4_K_M.gguf": DEMO, "same-Q8_0.gguf": DEMO})
    run.fetch(f"{NAME}:Q4_K_M", f"{NAME}:Q8_0")
    outside = run.home / "precious"
    outside.write_bytes(b"x")
    refused = run("run", "rm", NAME)
    assert refused.returncode == 2
    assert "rm asks on a terminal; elsewhere --yes must say it" in refused.stderr
    done = run("run", "rm", f"{NAME}:Q4_K_M", "--yes")
    assert "removed; 0 B are free again" in done.stderr  # the other file has the same bytes
    kept, gone = run.fetch(f"{NAME}:Q8_0", f"{NAME}:Q4_K_M", HF_HUB_OFFLINE="1").stdout.splitlines()
    assert Path(kept).exists()
    assert gone.startswith("hub_offline ")
    done = run("run", "rm", f"{NAME}:Q8_0", "--yes")
    assert "removed; 2.83 MB are free again" in done.stderr
    assert run.files() == []
    assert outside.exists()


def test_rm_asks_on_a_terminal(run: Runner) -> None:
    run.fetch()
    command = [sys.executable, "-m", "pyengine.cli.run", "rm", NAME]
    for answer, left in (("n", True), ("", True), ("y", False)):
        with Terminal(command, run.env) as terminal:
            terminal.wait_for("Remove? [y/N] ", 120)
            terminal.type(answer + "\n")
            assert terminal.exit_code(120) == 0
        assert bool(run.files()) is left
    assert "removed; 2.83 MB are free again" in terminal.seen
