"""The numbers of an answer as JSON, for ``--json`` and ``--stream-json``."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pyengine.events import Shifted, Stats
    from pyengine.sampling import SampleResult


def usage(s: Stats) -> dict[str, int]:
    """Tokens."""
    return {
        "prompt_tokens": s.prompt_tokens,
        "reused_tokens": s.reused_tokens,
        "completion_tokens": s.generated_tokens,
        "reasoning_tokens": s.reasoning_tokens,
        "drafted_tokens": s.drafted_tokens,
        "accepted_tokens": s.accepted_tokens,
    }


def timings(s: Stats) -> dict[str, float]:
    """Seconds, and tokens per second."""
    return {
        "prefill_seconds": round(s.prefill_seconds, 6),
        "decode_seconds": round(s.decode_seconds, 6),
        "prefill_tokens_per_second": round(s.prefill_rate, 3),
        "decode_tokens_per_second": round(s.decode_rate, 3),
    }


def shift_numbers(event: Shifted) -> dict[str, int]:
    """What was dropped when the context was full."""
    names = ("dropped_messages", "freed_tokens", "prompt_tokens", "context_size")
    return {name: getattr(event, name) for name in names}


def logprobs(token: SampleResult) -> dict[str, Any]:
    """A token with its log-probability, and the most likely ones."""
    top = [{"id": other.id, "logprob": _finite(other.logprob)} for other in token.top_logprobs]
    return {"id": token.id, "logprob": _finite(token.logprob), "top": top}


def _finite(x: float | None) -> float | None:
    """JSON has no infinity."""
    return x if x is not None and math.isfinite(x) else None
