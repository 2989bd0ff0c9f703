"""Models and sessions: token ids in, logits out."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Self

import numpy as np
import numpy.typing as npt

from pyengine import _core
from pyengine.errors import InvalidArgument, OutOfMemory
from pyengine.gguf_file import GgufFile, Metadata, fs_path, load_mode
from pyengine.memory import memory_is_refused
from pyengine.threads import Task

if TYPE_CHECKING:
    from pyengine.tokenizer import Tokenizer

KvType = Literal["f16", "f32", "q8_0"]
KV_TYPES: dict[KvType, int] = {"f16": 1, "f32": 0, "q8_0": 8}
MAX_THREADS = 512  # of a session
_NONE, _LAST, _ALL = 0, 1, 2  # pe_logits


class Model:
    """A GGUF model, immutable: any number of threads may use it, each with sessions of its own."""

    def __init__(self, core: _core.Model) -> None:
        self._core = core
        info = core.info()
        self.architecture: str = info["architecture"]
        self.n_vocab: int = info["n_vocab"]
        self.n_ctx_train: int = info["n_ctx_train"]
        self.n_layers: int = info["n_layers"]
        self.n_embd: int = info["n_embd"]
        self.n_heads: int = info["n_heads"]
        self.n_kv_heads: int = info["n_kv_heads"]
        self.head_dim_k: int = info["head_dim_k"]
        self.head_dim_v: int = info["head_dim_v"]
        self.n_ff: int = info["n_ff"]
        self.n_params: int = info["n_params"]
        self.weight_bytes: int = info["weight_bytes"]
        self.notes: list[str] = info["notes"].splitlines()
        self.file = GgufFile(core.file())
        self._tokenizer: _Ahead | None = None

    @classmethod
    def open(
        cls,
        path: str | os.PathLike[str],
        *,
        copy: bool = False,
        rope_attn_scale: float | None = None,
        progress: Callable[[float], object] | None = None,
        prefix_bytes: int = 256 << 20,
        tokenizer_ahead: bool = True,
    ) -> Self:
        """Opens and checks a model.

        Args:
            path: the GGUF file, or the first part of a split model.
            copy: read the weights into private memory instead of mapping the file.
            rope_attn_scale: overrides the attention scale of YaRN.
            progress: called with 0..1; returning ``False`` (or raising) stops the load.
            prefix_bytes: at most so much of what sessions let go is kept for later sessions whose texts begin alike,
                see :meth:`Session.reuse`; 0: nothing is, and sessions share nothing.
            tokenizer_ahead: build the tokenizer meanwhile and afterwards, in another thread; else when it is asked for.

        Errors: ``FileError``, ``FormatError``, ``UnsupportedError``, ``OutOfMemory``, ``Cancelled``, ``CpuError``.
        """
        if rope_attn_scale is not None and not rope_attn_scale > 0:
            raise InvalidArgument(f"rope_attn_scale is {rope_attn_scale}; expected a number > 0", code="bad_option")
        if not 0 <= prefix_bytes < 2**64:
            raise InvalidArgument(f"prefix_bytes is {prefix_bytes}; expected 0..2^64-1", code="bad_option")
        load = load_mode("copy" if copy else "mmap")
        ahead = tokenizer_ahead and not memory_is_refused()  # then one after the other, so that each can be told
        tokenizer = _Ahead(functools.partial(_tokenizer_of, fs_path(path))) if ahead else None
        model = cls(_core.Model.open(fs_path(path), load, rope_attn_scale or 0.0, progress, prefix_bytes))
        model._tokenizer = tokenizer
        return model

    @property
    def metadata(self) -> Metadata:
        return self.file.metadata

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """The file's tokenizer. Errors: see :meth:`pyengine.tokenizer.Tokenizer.from_metadata`."""
        from pyengine.tokenizer import Tokenizer

        ready = self._tokenizer.result() if self._tokenizer is not None else None
        return ready or Tokenizer.from_metadata(self.metadata)

    @functools.cached_property
    def fingerprint(self) -> int:
        """64 bits that tell models apart by what keys and values depend on; see ``pe_model_fingerprint``."""
        return self._core.fingerprint()

    @functools.cached_property
    def vocabulary(self) -> bytes:
        """SHA-256 of the file's tokens; equal for models of one vocabulary."""
        from pyengine.saved_logits import vocabulary_hash

        return vocabulary_hash(self.metadata.get("tokenizer.ggml.tokens", ()))

    def session(
        self, n_ctx: int = 0, threads: int = 0, threads_prefill: int = 0, kv_type: KvType = "f16", chunk: int = 0
    ) -> Session:
        """A new session; see :class:`Session`."""
        return Session(self, n_ctx, threads, threads_prefill, kv_type, chunk)

    def session_bytes(
        self, n_ctx: int = 0, threads: int = 0, threads_prefill: int = 0, kv_type: KvType = "f16", chunk: int = 0
    ) -> tuple[int, int]:
        """(KV cache, scratch) bytes that a session with these options allocates."""
        return _core.session_bytes(self._core, *_options(n_ctx, threads, threads_prefill, kv_type, chunk))

    def close(self) -> None:
        """Releases the model; open sessions keep the weights alive until they are closed."""
        self.file.close()
        self._core.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class _Ahead:
    """A tokenizer that another thread builds."""

    def __init__(self, build: Callable[[], Tokenizer]) -> None:
        self._task: Task[Tokenizer] | None = None
        with contextlib.suppress(OutOfMemory):
            self._task = Task(build)

    def result(self) -> Tokenizer | None:
        """Waits for it; ``None`` when it failed, or in the child of a fork, where the thread does not exist."""
        with contextlib.suppress(Exception):  # whoever asks builds it again, and gets the error with its cause
            return self._task.result() if self._task is not None else None
        return None


def _tokenizer_of(path: str) -> Tokenizer:
    from pyengine.tokenizer import Tokenizer

    return Tokenizer.from_gguf(path)


@dataclass(frozen=True)
class InputSums:
    """What one matrix was multiplied with: ``squares`` float64 [cols], the sum of x[col]² over ``tokens`` rows x."""

    tokens: int
    squares: npt.NDArray[np.float64]


class Session:
    """A token sequence with its KV cache; one thread at a time, except :meth:`cancel`.

    Args:
        n_ctx: positions of the cache; 0: the model's context, at most 4096.
        threads: when one token is evaluated, at most 512; 0: one per usable physical core of the fastest kind. Fewer
            take part where that is quicker (docs/doctor.md). threads_prefill: when several are; 0: as threads.
        kv_type: ``"f16"``, ``"f32"`` or ``"q8_0"`` (half of f16's memory; head dimensions must be multiples of 32).
        chunk: tokens per prefill step, at most 1024; no effect on any logit.
    """

    def __init__(
        self, model: Model, n_ctx: int, threads: int, threads_prefill: int, kv_type: KvType, chunk: int
    ) -> None:
        self.model = model
        options = _options(n_ctx, threads, threads_prefill, kv_type, chunk)
        self._core = _core.Session(model._core, *options)
        self.n_ctx = self._core.context()
        self.threads = self._core.threads()
        self.kv_type: KvType = kv_type

    def eval(
        self,
        tokens: Sequence[int] | npt.NDArray[np.integer],
        all_logits: bool = False,
        out: npt.NDArray[np.float32] | None = None,
    ) -> npt.NDArray[np.float32]:
        """Evaluates tokens after those already held.

        Args:
            tokens: ids.
            all_logits: every token's logits rather than the last one's.
            out: C-contiguous float32 [rows or more, n_vocab] to write to, so that no array is made for every token.

        Returns:
            The last token's logits, float32 [n_vocab]; with ``all_logits`` one row per token, [len(tokens), n_vocab].
            A view of ``out`` where it is given.

        Errors: ``InvalidArgument`` (no tokens, an id out of range), ``ContextFull`` (nothing evaluated), ``Cancelled``,
        ``NumericError``. After a failure ``len(session)`` says how many tokens it holds.
        """
        rows = self._core.eval(_ids(tokens), _ALL if all_logits else _LAST, out)
        return rows[: len(tokens)] if all_logits else rows[0]

    def prefill(self, tokens: Sequence[int] | npt.NDArray[np.integer]) -> None:
        """As :meth:`eval`, without computing logits."""
        self._core.eval(_ids(tokens), _NONE)

    @property
    def tokens(self) -> list[int]:
        """The ids held, in order."""
        return [int(i) for i in self._core.tokens()]

    def truncate(self, n: int) -> None:
        """Forgets everything after the first ``n`` tokens."""
        if n < 0:
            raise InvalidArgument(f"cannot keep {n} tokens", code="bad_length")
        self._core.truncate(n)

    def reuse(self, tokens: Sequence[int] | npt.NDArray[np.integer]) -> int:
        """Makes the session hold the longest known beginning of ``tokens`` (at most all but one) and nothing else.

        Known is what the session itself holds, what other sessions of the model with the same ``kv_type`` hold, and
        what such sessions held before, as far as ``prefix_bytes`` of :meth:`Model.open` allow. No effect on any logit.

        Returns how many tokens it holds: evaluate ``tokens[held:]`` next.
        """
        return self._core.reuse(_ids(tokens))

    def state_bytes(self, n: int) -> int:
        """Bytes of a state of ``n`` tokens. Errors: ``InvalidArgument`` unless 1 <= n <= ``n_ctx``."""
        return self._core.state_bytes(_count(n))

    def save(self, first: int = 0, n: int | None = None) -> npt.NDArray[np.uint8]:
        """The state of positions ``first`` .. ``first + n - 1`` (default: all the rest): their tokens, keys and values,
        with what is needed to recognise them, uint8 [state_bytes(n)].

        Errors: ``InvalidArgument`` when the session holds fewer.
        """
        return self._core.save(_count(first), _count(len(self) - first if n is None else n))

    def restore(self, state: bytes | bytearray | memoryview | npt.NDArray[np.uint8]) -> None:
        """Appends the tokens of a state that :meth:`save` gave, here or in another process; what follows is the same,
        to the bit, as if the session had evaluated them. It holds exactly the tokens that came before them.

        Errors, and the session is as it was: ``FormatError`` (no state, cut, damaged), ``InvalidArgument`` (of another
        model or ``kv_type``, follows other tokens), ``UnsupportedError`` (another numerics epoch), ``ContextFull``.
        """
        self._core.restore(state)

    def observe(self, on: bool = True) -> None:
        """From now on every eval adds up the squares of what each matrix reads, starting at zero; ``False``: no longer.

        No effect on any logit. An eval that fails after it began sets all sums to zero.
        """
        self._core.observe(on)

    @property
    def inputs(self) -> dict[str, InputSums]:
        """The sums of an observed session by the matrix's name, in the order of the forward pass.

        The matrix of the logits sees those tokens whose logits are asked for. Same bits for any threads and chunk.
        Errors: ``InvalidArgument`` when the session is not observed.
        """
        return {name: InputSums(tokens, squares) for name, tokens, squares in self._core.inputs()}

    def cancel(self) -> None:
        """From any thread: the running (or, when none runs, the next) eval raises ``Cancelled`` within 250 ms."""
        self._core.cancel()

    def check_cancel(self) -> None:
        """Raises ``Cancelled``, as the next eval would, when a :meth:`cancel` is waiting for it."""
        self._core.check_cancel()

    def clear_cancel(self) -> None:
        """Takes back a :meth:`cancel` that no eval has met."""
        self._core.clear_cancel()

    def close(self) -> None:
        self._core.close()

    def __len__(self) -> int:
        return self._core.length()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def default_threads() -> int:
    """What ``threads=0`` stands for here and now: physical cores of the fastest kind that affinity mask and control
    groups leave."""
    return _core.default_threads()


def shape_bytes(
    *,
    n_ctx_train: int,
    n_layers: int,
    n_embd: int,
    n_heads: int,
    n_kv_heads: int,
    head_dim: int,
    n_ff: int,
    n_ctx: int = 0,
    threads: int = 0,
    kv_type: KvType = "f16",
) -> tuple[int, int]:
    """(KV cache, scratch) bytes as :meth:`Model.session_bytes`, for a model of these sizes. Errors: ``EngineError``."""
    sizes = (n_ctx_train, n_layers, n_embd, n_heads, n_kv_heads, head_dim, n_ff)
    if not all(0 <= size < 2**32 for size in sizes):
        raise InvalidArgument(f"the sizes are {sizes}; expected 0..2^32-1", code="bad_shape")
    return _core.shape_bytes(*sizes, *_options(n_ctx, threads, 0, kv_type, 0))


def _options(
    n_ctx: int, threads: int, threads_prefill: int, kv_type: KvType, chunk: int
) -> tuple[int, int, int, int, int]:
    if kv_type not in KV_TYPES:
        raise InvalidArgument(f"kv_type is {kv_type!r}; expected one of {', '.join(KV_TYPES)}", code="bad_option")
    for name, value in {"threads": threads, "threads_prefill": threads_prefill}.items():
        if not 0 <= value <= MAX_THREADS:
            raise InvalidArgument(f"{name} is {value}; expected 0..{MAX_THREADS}", code="bad_option", field=name)
    for name, value in {"n_ctx": n_ctx, "chunk": chunk}.items():
        if not 0 <= value < 2**32:
            raise InvalidArgument(f"{name} is {value}; expected 0..2^32-1", code="bad_option")
    return n_ctx, threads, threads_prefill, KV_TYPES[kv_type], chunk


def _count(n: int) -> int:
    if not 0 <= n < 2**63:
        raise InvalidArgument(f"{n} is no number of tokens", code="bad_length")
    return n


def _ids(tokens: Sequence[int] | npt.NDArray[np.integer]) -> npt.NDArray[np.int32]:
    ids = np.asarray(tokens, dtype=None if len(tokens) else np.int32)
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise InvalidArgument(
            f"tokens have shape {ids.shape}, type {ids.dtype}; expected integers [n]", code="bad_tokens"
        )
    if ids.dtype != np.int32:
        if ids.size and (ids.min() < 0 or ids.max() >= 2**31):
            raise InvalidArgument("a token id is outside 0..2^31-1", code="bad_tokens")
        ids = ids.astype(np.int32)
    return np.ascontiguousarray(ids)
