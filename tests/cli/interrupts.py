"""How long Ctrl-C takes to stop an answer: at random moments, on a pseudo-terminal, with any model.

    python -m tests.cli.interrupts MODEL.gguf [--moments 200] [--record FILE]

Half of the moments fall into the reading of a long prompt, half into the answer. A latency is the time from the key to
"(stopped" on the screen. With ``--record`` they are added to a file, and the summary is of all that it holds.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from tests.cli.terminal import Terminal
from tests.support import ROOT

LIMIT = 0.250  # seconds, for 99 of 100


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--moments", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=3600.0, help="end earlier, after so many")
    parser.add_argument("--record", type=Path, help="a file that latencies are added to")
    args = parser.parse_args()
    found = measure(args.model, args.moments, args.seed, args.seconds)
    if args.record is not None:
        with args.record.open("a") as file:
            file.writelines(json.dumps(entry) + "\n" for entry in found)
        found = [json.loads(line) for line in args.record.read_text().splitlines()]
    return 0 if summarise(found) <= LIMIT else 1


def measure(model: str, moments: int, seed: int, seconds: float) -> list[tuple[str, float]]:
    """(what was going on, seconds until it had stopped) for each moment."""
    dice = random.Random(seed)
    end = time.monotonic() + seconds
    found: list[tuple[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        env = os.environ | {"PYTHONPATH": str(ROOT), "TERM": "xterm-256color", "XDG_STATE_HOME": folder}
        command = [sys.executable, "-m", "pyengine.cli.run", model, "-c", "8192", "--loop-limit", "0"]
        with Terminal(command, env) as chat:
            chat.wait_for_prompt(seconds=120.0)
            for moment in range(moments):
                if time.monotonic() > end:
                    break
                reading = moment % 2 == 0
                words = " ".join(str(dice.randrange(10**6)) for _ in range(1500 if reading else 3))
                chat.paste(f"{dice.random()} {words}")
                chat.wait_for("]" if reading else words[-5:])
                chat.type("\r")
                chat.wait_for("\x1b[?2004l")  # the line editor is done
                chat.wait_until(partial(is_busy, chat, reading), 120.0, "reading" if reading else "an answer")
                time.sleep(dice.uniform(0.0, 2.0))
                begin = time.monotonic()
                chat.interrupt()
                chat.wait_for("(stopped")
                found.append(("reading" if reading else "answering", time.monotonic() - begin))
                chat.wait_for_prompt()
                chat.type("/clear\r")
                chat.wait_for("(a new conversation)")
                chat.wait_for_prompt()
            chat.type("/bye\r")
            chat.exit_code()
    return found


def is_busy(chat: Terminal, reading: bool) -> bool:
    if reading:
        return "reading" in chat.unread
    return len(re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|reading[^\r]*\r", "", chat.unread)) > 10


def summarise(found: list[tuple[str, float]]) -> float:
    """Prints what came out; returns the 99th percentile of all, in seconds."""
    for kind in ("reading", "answering", "all"):
        times = sorted(seconds for what, seconds in found if kind in (what, "all"))
        if times:
            print(
                f"{kind:9} {len(times):4} moments: median {1e3 * times[len(times) // 2]:4.0f} ms, "
                f"p99 {1e3 * percentile(times, 0.99):4.0f} ms, longest {1e3 * times[-1]:4.0f} ms"
            )
    return percentile(sorted(seconds for _, seconds in found), 0.99)


def percentile(ordered: list[float], share: float) -> float:
    """The smallest that at least ``share`` of them do not exceed."""
    return ordered[math.ceil(len(ordered) * share) - 1]


if __name__ == "__main__":
    sys.exit(main())
