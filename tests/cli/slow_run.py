"""``pyengine-run`` with a model that takes its time: ``SLOW`` seconds a token, and for a prompt until it is cancelled.

Waiting happens where the engine would compute: outside the main thread, deaf to signals, ended by ``cancel`` alone.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from typing import Any

from pyengine.cli.run import main
from pyengine.model import Model, Session

_eval, _prefill, _cancel, _clear = Session.eval, Session.prefill, Session.cancel, Session.clear_cancel
_open = Model.open
_cancelled = threading.Event()


def wait(tokens: Any) -> None:
    stuck = len(tokens) > int(os.environ.get("STUCK_ABOVE", "1000"))
    _cancelled.wait(60.0 if stuck else float(os.environ.get("SLOW", "0.04")))
    _cancelled.clear()


def slow_eval(self: Session, tokens: Any, all_logits: bool = False, out: Any = None) -> Any:
    wait(tokens)
    return _eval(self, tokens, all_logits, out)


def slow_prefill(self: Session, tokens: Any) -> None:
    wait(tokens)
    _prefill(self, tokens)


def slow_cancel(self: Session) -> None:
    _cancel(self)
    _cancelled.set()


def slow_open(path: Any, *, progress: Any = None, **options: Any) -> Model:
    """``SLOW_LOAD``: seconds for the first half of the file."""
    time.sleep(float(os.environ.get("SLOW_LOAD", "0")))
    if progress is not None:
        progress(0.5)
    return _open(path, progress=progress, **options)


def slow_clear(self: Session) -> None:
    _clear(self)
    _cancelled.clear()


Model.open = slow_open  # type: ignore[assignment,method-assign]
Session.clear_cancel = slow_clear  # type: ignore[method-assign]
Session.eval = slow_eval  # type: ignore[method-assign]
Session.prefill = slow_prefill  # type: ignore[method-assign]
Session.cancel = slow_cancel  # type: ignore[method-assign]
sys.exit(main())
