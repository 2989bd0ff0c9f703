"""``pyengine-run --stream-json``: requests on stdin, events on stdout, one JSON object a line. docs/stream.md is its
manual.

Three threads. The main one reads lines and answers at once what does not need the model, so that a cancel is never
behind an answer. The worker takes one request after the other from a queue. The writer hands events to the host; when
the host does not read, the worker waits for it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import secrets
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyengine.cli.common import EXIT_OK, EXIT_PIPE, describe
from pyengine.cli.host import MAX_LINE, Host
from pyengine.cli.report import logprobs, shift_numbers, timings, usage
from pyengine.errors import EngineError, InvalidArgument
from pyengine.json_fields import Fields, kind_of, parse, settings_from_json, settings_to_json
from pyengine.threads import Task

if TYPE_CHECKING:
    from pyengine.cli.setup import Setup
    from pyengine.events import Event

PROTOCOL = 1
MAX_QUEUE = 64  # requests that wait
_PROGRESS = 0.1  # seconds between two reports at least
_MAX_WRITTEN = 1000  # remembered answers in unusual tokens

Id = str | int


class Refused(InvalidArgument):
    """A line that is no request; nothing else is touched by it."""


def serve(path: Path, args: argparse.Namespace, open_setup: Callable[[Path, argparse.Namespace], Setup]) -> int:
    """Speaks the protocol until the host ends it; returns the exit code. What fails before is an event too."""
    out = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what anybody else prints must not stand between events
    host = Host(sys.stdin.fileno(), out)
    try:
        try:
            setup = open_setup(path, args)
        except (EngineError, OSError) as error:
            host.put(_error(None, None, error))
            raise
        with setup:
            return Server(setup, host).run()
    finally:
        host.close()


def _error(request_id: Id | None, line: int | None, error: Exception) -> dict[str, Any]:
    code = error.code if isinstance(error, EngineError) else "io_error" if isinstance(error, OSError) else "internal"
    message = describe(error) if isinstance(error, EngineError) else str(error)
    event: dict[str, Any] = {"event": "error", "id": request_id, "line": line, "code": code, "message": message}
    if isinstance(error, EngineError) and error.field:
        event["field"] = error.field
    return event


# ---- requests ----


@dataclass(eq=False)
class _Request:
    """One that waits for the worker, or is there. ``cancelled``: asked to stop; ``ended``: its last event is out."""

    id: Id
    line: int
    job: Callable[[_Request], None]
    phase: str = "queued"  # queued, preparing, running
    cancelled: bool = False
    ended: bool = False


@dataclass
class _Totals:
    requests: int = 0
    cancelled: int = 0
    errors: int = 0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    completion_tokens: int = 0


@dataclass
class _Wanted:
    """A generate request, checked."""

    messages: list[dict[str, Any]] | None
    prompt: str | None
    parse_special: bool
    options: dict[str, Any]  # of Chat and generate
    overflow: str
    ids: bool
    logprobs: bool = field(default=False)


class Server:
    """The state of one run, and what is done for each request."""

    def __init__(self, setup: Setup, host: Host) -> None:
        self._setup = setup
        self._host = host
        self._session = setup.session
        self._started = time.monotonic()
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        self._queue: deque[_Request] = deque()
        self._running: _Request | None = None
        self._finishing = False  # nothing new is accepted; what was is answered
        self._totals = _Totals()
        self._written: dict[str, tuple[int, ...]] = {}
        self._requests: dict[str, Callable[[Id, int, Fields], None]] = {
            "generate": self._generate,
            "cancel": self._cancel,
            "stats": self._stats,
            "count": self._count,
            "save": self._save,
            "load": self._load,
            "finish": self._finish,
        }

    def run(self) -> int:
        self._host.put(self._hello())
        worker = Task(self._worker)
        try:
            for number, line in enumerate(self._host.lines(), start=1):
                if line is None or line.strip():
                    self._take(number, line)
            while self._finishing and not self._host.gone and not worker.wait(0.1):
                pass
        finally:
            self._stop_everything()
            worker.result()
        return EXIT_PIPE if self._host.gone else EXIT_OK

    def _take(self, number: int, line: bytes | None) -> None:
        """One line. Whatever is wrong with it becomes an event."""
        request_id: Id | None = None
        try:
            if line is None:
                raise Refused(f"the line has more than {MAX_LINE} bytes", code="line_too_long")
            try:
                values = parse(line)
            except ValueError as error:
                raise Refused(f"the line is no JSON: {error}", code="bad_json") from None
            if not isinstance(values, dict):
                raise Refused(f"the line is {kind_of(values)}; expected an object", code="bad_request")
            fields = Fields(values, lambda what, name: Refused(what, code="bad_request", field=name))
            request_id = _id_of(fields)
            if _SURROGATE.search(line):
                _check_unicode(values)
            name = fields.value("request", str)
            if name not in self._requests:
                raise Refused(
                    f"there is no request {name[:60]!r}; known are {', '.join(self._requests)}", code="unknown_request"
                )
            self._requests[name](request_id, number, fields)
        except Exception as error:
            self._host.put_in_turn(_error(request_id, number, error))

    # ---- what is answered at once ----

    def _hello(self) -> dict[str, Any]:
        from pyengine import __version__, numerics_epoch

        m, setup = self._setup.model, self._setup
        name = m.metadata.get("general.name")
        return {
            "event": "hello",
            "protocol": PROTOCOL,
            "engine": f"pyengine {__version__}",
            "numerics_epoch": numerics_epoch(),
            "pid": os.getpid(),
            "model": {
                "name": name if isinstance(name, str) else None,
                "architecture": m.architecture,
                "parameters": m.n_params,
                "vocabulary": m.n_vocab,
                "context_trained": m.n_ctx_train,
                "reasons": setup.profile.reasons,
                "chat_template": None if setup.template is None else setup.template.origin,
            },
            "context": self._session.n_ctx,
            "kv_type": self._session.kv_type,
            "threads": self._session.threads,
            "settings": settings_to_json(setup.settings),
            "limits": {"line_bytes": MAX_LINE, "queue": MAX_QUEUE},
        }

    def _cancel(self, request_id: Id, number: int, fields: Fields) -> None:
        fields.only(("request", "id", "target"))
        target = fields.value("target", str, int)
        with self._lock:
            found = self._find(target)
            if found is not None:
                self._stop(found)
        if found is None:
            raise Refused(f"no request {str(target)[:60]!r} is waiting or running", code="not_found", field="target")
        self._host.look_again()
        self._host.put_in_turn({"event": "ok", "id": request_id})

    def _stats(self, request_id: Id, number: int, fields: Fields) -> None:
        fields.only(("request", "id"))
        kv, scratch = self._setup.model.session_bytes(
            n_ctx=self._session.n_ctx, threads=self._session.threads, kv_type=self._session.kv_type
        )
        with self._lock:
            event = {
                "event": "stats",
                "id": request_id,
                "uptime_seconds": round(time.monotonic() - self._started, 3),
                "running": None if self._running is None else self._running.id,
                "queued": [request.id for request in self._queue],
                "context": {"size": self._session.n_ctx, "used": len(self._session)},
                "memory": {"kv_bytes": kv, "scratch_bytes": scratch, "weight_bytes": self._setup.model.weight_bytes},
                "totals": dict(self._totals.__dict__),
            }
        self._host.put_in_turn(event)

    def _count(self, request_id: Id, number: int, fields: Fields) -> None:
        fields.only(("request", "id", "messages", "prompt", "parse_special"))
        wanted = self._wanted(fields)
        self._host.put_in_turn({"event": "count", "id": request_id, "tokens": len(self._prompt_ids(wanted))})

    def _finish(self, request_id: Id, number: int, fields: Fields) -> None:
        fields.only(("request", "id"))
        with self._lock:
            self._finishing = True
            self._work.notify_all()
        self._host.put_in_turn({"event": "ok", "id": request_id})

    # ---- what waits for the worker ----

    def _generate(self, request_id: Id, number: int, fields: Fields) -> None:
        known = ("request", "id", "messages", "prompt", "parse_special", "settings", "max_tokens", "stop")
        fields.only((*known, "think_budget", "loop_limit", "overflow", "ids"))
        wanted = self._wanted(fields)
        self._accept(request_id, number, lambda request: self._answer(request, wanted))

    def _save(self, request_id: Id, number: int, fields: Fields) -> None:
        from pyengine.chat_file import save_keys

        path = _path_of(fields)

        def job(request: _Request) -> None:
            save_keys(path, self._session)
            self._last(request, {"event": "ok", "id": request.id, "tokens": len(self._session)})

        self._accept(request_id, number, job)

    def _load(self, request_id: Id, number: int, fields: Fields) -> None:
        from pyengine.chat_file import restore_keys

        path = _path_of(fields)

        def job(request: _Request) -> None:
            _, tokens, note = restore_keys(path, self._session)
            self._last(request, {"event": "ok", "id": request.id, "tokens": tokens, "note": note or None})

        self._accept(request_id, number, job)

    def _accept(self, request_id: Id, number: int, job: Callable[[_Request], None]) -> None:
        request = _Request(request_id, number, job)
        with self._lock:
            if self._finishing:
                raise Refused("nothing is accepted after finish", code="finishing")
            if self._find(request_id) is not None:
                raise Refused(f"a request {request_id!r} is waiting or running already", code="duplicate_id")
            if len(self._queue) >= MAX_QUEUE:
                raise Refused(f"{MAX_QUEUE} requests are waiting already", code="queue_full")
            waiting = len(self._queue) + (self._running is not None)
            self._totals.requests += 1
            self._host.put({"event": "accepted", "id": request_id, "line": number, "waiting": waiting})
            self._queue.append(request)
            self._work.notify_all()

    def _find(self, request_id: Id) -> _Request | None:
        """Holding the lock."""
        requests = [*self._queue] if self._running is None else [self._running, *self._queue]
        return next((r for r in requests if r.id == request_id and not r.ended), None)

    def _stop(self, request: _Request) -> None:
        """Holding the lock. One that has not begun to run ends here; the end of another comes from the session."""
        request.cancelled = True
        if request.phase == "running":
            self._session.cancel()
            return
        if request.phase == "queued":
            self._queue.remove(request)
        request.ended = True
        self._totals.cancelled += 1
        self._host.put({"event": "end", "id": request.id, "reason": "cancelled", "usage": None, "timings": None})

    def _stop_everything(self) -> None:
        """Nobody is left to answer: stops everything."""
        with self._lock:
            self._finishing = True
            for request in [*self._queue, *([self._running] if self._running is not None else [])]:
                if not request.ended:
                    self._stop(request)
            self._work.notify_all()
        self._host.look_again()

    # ---- the worker ----

    def _worker(self) -> None:
        while True:
            with self._lock:
                self._work.wait_for(lambda: self._queue or self._finishing)
                if not self._queue:
                    self._host.hang_up()
                    return
                request = self._running = self._queue.popleft()
                request.phase = "preparing"
            try:
                request.job(request)
            except Exception as error:
                self._last(request, _error(request.id, request.line, error))
            finally:
                with self._lock:
                    self._running = None
                    self._session.clear_cancel()

    def _last(self, request: _Request, event: dict[str, Any]) -> None:
        """The last event of a request, unless that is out. It never waits: a host has as many as it asked for."""
        with self._lock:
            if request.ended:
                return
            request.ended = True
            self._totals.errors += event["event"] == "error"
            self._totals.cancelled += event.get("reason") == "cancelled"
            self._host.put(event)

    def _answer(self, request: _Request, wanted: _Wanted) -> None:
        from pyengine.events import End

        events = self._events(request, wanted)
        with self._lock:
            if request.cancelled:
                return
            request.phase = "running"
        self._host.put({"event": "started", "id": request.id})
        for event in events:
            if isinstance(event, End):
                s = event.stats
                with self._lock:
                    self._totals.prompt_tokens += s.prompt_tokens
                    self._totals.reused_tokens += s.reused_tokens
                    self._totals.completion_tokens += s.generated_tokens
                self._last(
                    request,
                    {
                        "event": "end",
                        "id": request.id,
                        "reason": event.reason,
                        "stop": event.stop,
                        "misread": event.misread,
                        "seed": s.seed,
                        "context": {"size": s.context_size, "used": s.context_used},
                        "usage": usage(s),
                        "timings": timings(s),
                        **_tokens_of(event, wanted),
                    },
                )
            else:
                self._host.put_in_turn(_event(request.id, event, wanted), drop=lambda: request.cancelled)

    def _events(self, request: _Request, wanted: _Wanted) -> Iterator[Event]:
        from pyengine.generate import Chat, generate

        last = 0.0

        def progress(done: int, total: int) -> None:
            nonlocal last
            now = time.monotonic()
            if now - last >= _PROGRESS:
                last = now
                event = {"event": "progress", "id": request.id, "done": done, "total": total}
                self._host.put_in_turn(event, drop=lambda: request.cancelled)

        options = {"on_prefill": progress, "speculate": self._setup.speculate, **wanted.options}
        if wanted.messages is None:
            return generate(self._session, self._prompt_ids(wanted), reasoning=False, **options)
        chat = Chat(
            self._setup.model,
            template=self._template(),
            session=self._session,
            overflow=wanted.overflow,  # type: ignore[arg-type]
            **options,
        )
        if len(self._written) > _MAX_WRITTEN:
            self._written.clear()
        chat.written = self._written
        return chat.continue_with(wanted.messages)

    def _prompt_ids(self, wanted: _Wanted) -> list[int]:
        from pyengine.chat import build_prompt

        tokenizer = self._setup.model.tokenizer
        if wanted.prompt is not None:
            return tokenizer.encode(wanted.prompt, parse_special=wanted.parse_special)
        assert wanted.messages is not None
        return build_prompt(self._template(), tokenizer, wanted.messages, written=self._written).ids

    def _template(self) -> Any:
        if self._setup.template is None:
            raise self._setup.no_template or Refused("--raw was given: use prompt", code="no_chat_template")
        return self._setup.template

    def _wanted(self, fields: Fields) -> _Wanted:
        """What is asked for, over what the command line says."""
        from pyengine.chat import check_messages
        from pyengine.generate import OVERFLOWS

        messages, prompt = fields.maybe("messages", list), fields.maybe("prompt", str)
        if (messages is None) == (prompt is None):
            raise Refused("expected either 'messages' or 'prompt'", code="bad_request", field="messages")
        if messages is not None:
            if not messages:
                raise fields.bad("messages", "is empty")
            check_messages(messages)
            self._template()
        elif not prompt:
            raise fields.bad("prompt", "is empty")
        setup = self._setup
        overflow = fields.maybe("overflow", str) or setup.args.overflow
        if overflow not in OVERFLOWS or (prompt is not None and overflow == "shift"):
            raise fields.bad(
                "overflow", f"is {overflow[:20]!r}; expected one of {', '.join(OVERFLOWS)}; with prompt, stop"
            )
        settings = setup.settings
        if fields.maybe("settings", dict) is not None:
            settings = settings_from_json(fields.fields("settings"), settings)
        if settings.seed is None:  # one that every language keeps
            settings = dataclasses.replace(settings, seed=secrets.randbits(53))

        def number(name: str, least: int, default: int | None) -> int | None:
            return fields.number(name, least) if name in fields.values else default

        return _Wanted(
            messages=messages,
            prompt=prompt,
            parse_special=bool(fields.maybe("parse_special", bool)),
            options={
                "settings": settings,
                "max_tokens": number("max_tokens", 1, setup.max_tokens),
                "think_budget": number("think_budget", 0, setup.args.think_budget),
                "loop_limit": number("loop_limit", 1, setup.loop_limit),
                "stop": fields.texts("stop") if "stop" in fields.values else tuple(setup.args.stop),
            },
            overflow=overflow,
            ids=bool(fields.maybe("ids", bool)),
            logprobs=settings.top_logprobs is not None,
        )


_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")  # half a character may be written as an escape


def _check_unicode(values: dict[str, Any]) -> None:
    try:
        json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise Refused("the line has half a character: an escape \\ud800..\\udfff alone", code="invalid_text") from None


def _id_of(fields: Fields) -> Id:
    request_id: Id = fields.value("id", str, int)
    if isinstance(request_id, str) and any(0xD800 <= ord(char) < 0xE000 for char in request_id):
        raise Refused("'id' has half a character", code="invalid_text", field="id")
    if isinstance(request_id, str) and not 1 <= len(request_id) <= 128:
        raise Refused(f"'id' has {len(request_id)} characters; expected 1..128", code="bad_request", field="id")
    if isinstance(request_id, int) and abs(request_id) >= 2**53:
        raise Refused("'id' is a number that not every language keeps; expected less than 2^53", code="bad_request")
    return request_id


def _path_of(fields: Fields) -> Path:
    fields.only(("request", "id", "path"))
    path = fields.value("path", str)
    if not path or "\0" in path:
        raise fields.bad("path", "is no path")
    return Path(path)


def _event(request_id: Id, event: Event, wanted: _Wanted) -> dict[str, Any]:
    from pyengine.events import Reasoning, Shifted, Text

    if isinstance(event, Shifted):
        return {"event": "shifted", "id": request_id, **shift_numbers(event)}
    assert isinstance(event, (Reasoning, Text))
    kind = "reasoning" if isinstance(event, Reasoning) else "text"
    return {"event": kind, "id": request_id, "text": event.text, **_tokens_of(event, wanted)}


def _tokens_of(event: Event, wanted: _Wanted) -> dict[str, Any]:
    if wanted.logprobs:
        return {"tokens": [logprobs(token) for token in event.tokens]}
    return {"tokens": [{"id": token.id} for token in event.tokens]} if wanted.ids else {}
