"""What MODEL means on a command line, and ``pyengine-run list|show|rm``. docs/names.md is the manual."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyengine.cli.common import EXIT_OK, Status, UsageError, duration, printable, run_command, say, use_utf8
from pyengine.errors import EngineError

if TYPE_CHECKING:
    from pyengine.hub import Cached, Unfinished

COMMANDS = ("list", "show", "rm")
MODEL_HELP = "a GGUF file (the first part of a split one), or hf:org/repo[:Q4_K_M]"
_PREFIX = "hf:"  # hub.PREFIX: that module is imported only for such names


def model_file(model: str | Path) -> Path:
    """The file that MODEL means: downloaded where it is a name on the hub that the cache does not hold."""
    model = str(model)
    if not model.startswith(_PREFIX):
        return Path(model)
    from pyengine import hub

    with _told() as tell:
        return hub.fetch(model, **tell)


@contextlib.contextmanager
def model_outline(model: str) -> Iterator[str]:
    """As :func:`model_file`, for what only looks at sizes: nothing but the header is read from the hub."""
    if not model.startswith(_PREFIX):
        yield model
        return
    from pyengine import hub

    with contextlib.ExitStack() as stack:
        with _told() as tell:
            path = stack.enter_context(hub.outline(model, **tell))
        yield str(path)


@contextlib.contextmanager
def _told() -> Iterator[dict[str, Any]]:
    """Progress on the status line, notes as lines."""
    status = Status()
    meter = _Meter(status)

    def note(sentence: str) -> None:
        status.clear()
        say(f"note: {sentence}")

    try:
        yield {"progress": meter.show, "note": note}
    except KeyboardInterrupt:
        status.clear()
        if meter.is_download:
            say("the download was stopped; the same command goes on with it")
        raise
    finally:
        status.clear()


class _Meter:
    """``downloading m.gguf: 1.2 of 4.9 GB, 35 MB/s, 1:46 left``."""

    def __init__(self, status: Status) -> None:
        self._status = status
        self._what = ""
        self._shown = 0.0
        self._start, self._first = 0.0, 0
        self.is_download = False

    def show(self, what: str, done: int, total: int) -> None:
        from pyengine.hub import size_text

        now = time.monotonic()
        if what != self._what:
            self._what, self._start, self._first, self._shown = what, now, done, 0.0
            self.is_download = what.startswith("downloading")
        if now - self._shown < 0.2 and done < total:
            return
        self._shown = now
        text = f"{_short(what)}: {size_text(done)} of {size_text(total)}"
        seconds, arrived = now - self._start, done - self._first
        if seconds > 1 and arrived > 0:
            rate = arrived / seconds
            text += f", {size_text(int(rate))}/s, {duration((total - done) / rate)} left"
        self._status.show(text)


def _short(text: str, most: int = 24) -> str:
    """The end of a long name says more than its beginning."""
    verb, _, name = printable(text).rpartition(" ")
    return f"{verb} {name}" if len(name) <= most else f"{verb} ...{name[-most:]}"


# --- list, show, rm ---------------------------------------------------------------------------------------------------


def main(argv: Sequence[str], name: str) -> int:
    """``list``, ``show`` or ``rm`` with its arguments; returns the exit code."""
    use_utf8()
    args = _parser(name).parse_args(argv)
    commands: dict[str, Callable[[argparse.Namespace], int]] = {"list": _list, "show": _show, "rm": _remove}
    return run_command(name, lambda: commands[args.command](args), debug=args.debug)


def _parser(name: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=name, description="The models by name that were downloaded.")
    commands = parser.add_subparsers(dest="command", required=True)
    for command, text in (
        ("list", "what the cache holds"),
        ("show", "files, sizes, revision and facts of a model in the cache"),
        ("rm", "remove a model from the cache; asks first"),
    ):
        sub = commands.add_parser(command, help=text, description=text)
        if command != "list":
            sub.add_argument("names", nargs="+", metavar="NAME", help="hf:org/repo[@revision][:Q4_K_M]")
        if command == "show":
            sub.add_argument("--check", action="store_true", help="read the files and compare their hashes")
        if command == "rm":
            sub.add_argument("-y", "--yes", action="store_true", help="do not ask")
        else:
            sub.add_argument("--json", action="store_true", help="print one JSON array")
        sub.add_argument("--debug", action="store_true", help="show tracebacks")
    return parser


def _list(args: argparse.Namespace) -> int:
    from pyengine import hub

    models, unfinished = hub.cached()
    if args.json:
        print(json.dumps([*map(_facts, models), *map(_facts_of_unfinished, unfinished)], ensure_ascii=False))
        return EXIT_OK
    if not models and not unfinished:
        say(f"no models in {hub.cache_folder()}")
        return EXIT_OK
    rows = [(printable(m.name), hub.size_text(m.choice.size), _ago(m.used)) for m in models]
    rows += [(f"{hub.PREFIX}{printable(u.repo)} (unfinished)", hub.size_text(u.size), "") for u in unfinished]
    wide = max(len(name) for name, _, _ in rows)
    for name, size, used in rows:
        print(f"{name:<{wide}}  {size:>8}  {used}".rstrip())
    say(f"in {hub.cache_folder()}")
    return EXIT_OK


def _show(args: argparse.Namespace) -> int:
    found = [model for name in args.names for model in _found(name)]
    facts = [_facts(model) | _header_facts(model) | (_checked(model) if args.check else {}) for model in found]
    if args.json:
        print(json.dumps(facts, ensure_ascii=False))
    else:
        blocks = []
        for entry in facts:
            lines = [printable(str(entry.pop("name")))]
            shown = {k: v for k, v in entry.items() if v not in (None, "", [])}
            lines += [f"  {key.replace('_', ' '):<14}{printable(_text(key, value))}" for key, value in shown.items()]
            blocks.append("\n".join(lines))
        print("\n\n".join(blocks))
    return 1 if any(entry.get("hash") == "wrong" for entry in facts) else EXIT_OK


def _remove(args: argparse.Namespace) -> int:
    from pyengine import hub

    models: dict[Path, Cached] = {}
    unfinished: dict[str, Unfinished] = {}
    for name in args.names:
        wanted = hub.parse(name)
        rest = [] if wanted.what or wanted.revision else [u for u in hub.cached()[1] if u.repo == wanted.repo]
        for model in hub.find_cached(name) if rest else _found(name):
            models[model.path] = model
        unfinished |= {u.repo: u for u in rest}
    for model in models.values():
        say(f"{model.name}  {hub.size_text(model.choice.size)}  {model.choice.path}")
    for left in unfinished.values():
        say(f"{hub.PREFIX}{left.repo} (unfinished)  {hub.size_text(left.size)}")
    if not args.yes and not _confirmed():
        say("nothing was removed")
        return EXIT_OK
    freed = hub.remove(list(models.values()), list(unfinished.values()))
    say(f"removed; {hub.size_text(freed)} are free again")
    return EXIT_OK


def _confirmed() -> bool:
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise UsageError("rm asks on a terminal; elsewhere --yes must say it")
    say("Remove? [y/N] ", end="")
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _found(name: str) -> list[Cached]:
    from pyengine import hub

    found = hub.find_cached(name)
    if not found:
        held = ", ".join(model.name for model in hub.cached()[0][:20]) or "nothing"
        raise UsageError(f"{name} is not in the cache ({hub.cache_folder()}); there is {held}")
    return found


def _facts(model: Cached) -> dict[str, Any]:
    return {
        "name": model.name,
        "path": str(model.path),
        "files": [part.path for part in model.choice.parts],
        "size": model.choice.size,
        "quantisation": model.choice.quantisation,
        "revision": model.revision,
        "refs": list(model.refs),
        "used": round(model.used),
    }


def _facts_of_unfinished(unfinished: Unfinished) -> dict[str, Any]:
    return {"name": f"{_PREFIX}{unfinished.repo}", "unfinished": True, "size": unfinished.size}


def _header_facts(model: Cached) -> dict[str, Any]:
    """What the file says of itself; why it cannot be read, where it cannot."""
    from pyengine.gguf_file import GgufFile

    try:
        with GgufFile.open(model.path, load="header") as file:
            values = file.metadata
            arch = values.get("general.architecture")
            weights = sum(tensor.rows * tensor.cols for tensor in file.tensors.values())
            return {
                "model": values.get("general.name"),
                "architecture": arch,
                "weights": weights,
                "context": values.get(f"{arch}.context_length"),
                "template": "tokenizer.chat_template" in values,
            }
    except EngineError as error:
        return {"problem": error.message}


def _checked(model: Cached) -> dict[str, str]:
    from pyengine import hub

    with _told() as tell:
        good = hub.check(model, tell["progress"])
    return {"hash": {True: "right", False: "wrong", None: "unknown to the cache"}[good]}


def _text(key: str, value: Any) -> str:
    from pyengine.hub import size_text

    match key:
        case "size":
            return size_text(value)
        case "used":
            return _ago(value)
        case "weights":
            return f"{value / 1e9:.2f} B" if value >= 1e8 else f"{value / 1e6:.2f} M"
        case "files" | "refs":
            return ", ".join(value)
        case "template":
            return "yes" if value else "none"
        case _:
            return str(value)


def _ago(then: float) -> str:
    minutes = max(0, int(time.time() - then) // 60)
    for unit, size in (("day", 24 * 60), ("hour", 60), ("minute", 1)):
        if minutes >= size:
            n = minutes // size
            return f"{n} {unit}{'s' if n > 1 else ''} ago"
    return "now"
