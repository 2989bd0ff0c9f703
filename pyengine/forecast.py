"""How fast a model will run here: the engine's own kernels timed for about a second, on every thread at once."""

from __future__ import annotations

import mmap
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pyengine import quant
from pyengine.model import KV_TYPES, KvType

PROMPT = 512  # tokens of the prompt that prefill is forecast for
_COLS = 4096
_PATTERN = 8  # rows of weights that are repeated
_PREFILL_ROWS = 256
_TOKENS = 256  # read at once in prefill, as a session does
_BYTES = 768 << 20  # of weights read, all formats and threads together: more than any cache holds
_LEAST_BYTES = 2 << 20  # of a format and thread
# Of a decode step, beside its matrices: norms, rotations, and meetings of the threads at barriers.
_LAYER_SECONDS = 25e-6


@dataclass(frozen=True)
class Speed:
    """What this machine's kernels do, all threads together.

    Attributes:
        tier: instruction sets in use; threads: that ran.
        stream: format -> bytes of weights a second, one token at a time (decode).
        products: format -> multiplications a second, 256 tokens at a time (prefill).
        cache: cache type -> bytes of keys and values a second, one token at a time.
    """

    tier: str
    threads: int
    stream: Mapping[str, float]
    products: Mapping[str, float]
    cache: Mapping[KvType, float]

    @property
    def bandwidth(self) -> float:
        """Bytes a second of the format that is read fastest."""
        return max(self.stream.values())


@dataclass(frozen=True)
class _Task:
    """Something timed: ``call(buffer)`` does ``amount`` of work; ``size``: of its buffer, ``pattern`` repeated."""

    amount: float
    size: int
    pattern: npt.NDArray[np.uint8]
    call: Callable[[npt.NDArray[np.uint8]], object]


def measure(
    formats: Iterable[str], kv_types: Iterable[KvType], group: int, head_dim: int, threads: int, seconds: float = 1.0
) -> Speed:
    """Times the kernels of some formats, and attention of ``group`` heads to a KV head. Takes a little more time."""
    names, caches = sorted(set(formats)), list(kv_types)
    tier = quant.tier_active()
    size = max(_LEAST_BYTES, _BYTES // (threads * (len(names) + len(caches))))
    one = [_weights(tier, name, size, 1) for name in names] + [_cache(tier, kv, size, group, head_dim) for kv in caches]
    many = [_weights(tier, name, size, _TOKENS) for name in names]
    reading = _rates(one, threads, seconds / 2)
    return Speed(
        tier,
        threads,
        stream=dict(zip(names, reading, strict=False)),
        products=dict(zip(names, _rates(many, threads, seconds / 2), strict=True)),
        cache=dict(zip(caches, reading[len(names) :], strict=True)),
    )


def _weights(tier: str, name: str, size: int, tokens: int) -> _Task:
    """Reads the weights for one token, or multiplies a few of them with many."""
    row = quant.find(name).row_bytes(_COLS)
    rows = size // (row * _PATTERN) * _PATTERN if tokens == 1 else _PREFILL_ROWS
    x = np.ones((tokens, _COLS), np.float32)
    amount = rows * row if tokens == 1 else rows * _COLS * tokens
    return _Task(amount, rows * row, _some_rows(name), lambda b: quant.linear(tier, name, b, rows, _COLS, x))


def _cache(tier: str, kv: KvType, size: int, group: int, head_dim: int) -> _Task:
    """Reads keys and values for one token's queries of a KV head."""
    pattern = _some_rows(kv.upper())
    half = size // 2 // len(pattern) * len(pattern)
    keys = half // quant.find(kv.upper()).row_bytes(head_dim)
    half = keys * quant.find(kv.upper()).row_bytes(head_dim)
    q = np.ones((group, head_dim), np.float32)
    return _Task(2 * half, 2 * half, pattern, lambda b: quant.attend(tier, KV_TYPES[kv], b[:half], b[half:], keys, q))


def _pages(size: int) -> npt.NDArray[np.uint8]:
    """Memory in pages of the ordinary size, as those of a mapped file are: large ones are read faster."""
    memory = mmap.mmap(-1, size)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, np.uint8)


def _some_rows(name: str) -> npt.NDArray[np.uint8]:
    """Packed weights, uint8 [bytes], of :data:`_PATTERN` rows, with scales of an ordinary size."""
    fmt = quant.find(name)
    rng = np.random.default_rng(0)
    if fmt.can_quantise:
        return quant.quantise(name, rng.standard_normal((_PATTERN, _COLS), np.float32) / 64).reshape(-1)
    return rng.integers(0x10, 0x3C, _PATTERN * fmt.row_bytes(_COLS), np.uint8)  # as float16: positive, below 1


def _buffer(task: _Task) -> npt.NDArray[np.uint8]:
    buffer = _pages(task.size)
    whole = task.size // len(task.pattern) * len(task.pattern)
    buffer[:whole].reshape(-1, len(task.pattern))[:] = task.pattern
    buffer[whole:] = task.pattern[: task.size - whole]
    return buffer


def _rates(tasks: Sequence[_Task], threads: int, seconds: float) -> list[float]:
    """Amount a second of each task, all threads together: each thread's by the mean of its rounds.

    A round does every task once, so that a change of the machine meets them all, and caches keep nothing from the last.
    """
    buffers = [[_buffer(task) for task in tasks] for _ in range(threads)]
    rates = [0.0] * len(tasks)
    lock = threading.Lock()
    together = threading.Barrier(threads)

    def run(own: Sequence[npt.NDArray[np.uint8]]) -> None:
        times: list[list[float]] = []
        end = 0.0
        while len(times) < 2 or time.perf_counter() < end:  # the first round is not counted
            times.append([_timed(task, buffer) for task, buffer in zip(tasks, own, strict=True)])
            if len(times) == 1:
                together.wait()
                end = time.perf_counter() + seconds
        for i, task in enumerate(tasks):
            with lock:
                rates[i] += task.amount / statistics.fmean(row[i] for row in times[1:])

    team = [threading.Thread(target=run, args=(own,)) for own in buffers]
    for thread in team:
        thread.start()
    for thread in team:
        thread.join()
    return rates


def _timed(task: _Task, buffer: npt.NDArray[np.uint8]) -> float:
    begin = time.perf_counter()
    task.call(buffer)
    return time.perf_counter() - begin


@dataclass(frozen=True)
class Work:
    """What a token costs: bytes read and multiplications by format.

    Attributes:
        head: multiplications that make the logits, which a prompt does once; head_format: their weights'.
    """

    bytes: Mapping[str, int]
    products: Mapping[str, int]
    head: int
    head_format: str
    layers: int

    def decode(self, speed: Speed, kv_type: KvType, kv_bytes: int) -> float:
        """Tokens a second, one at a time, with ``kv_bytes`` of keys and values in the context."""
        matrices = sum(n / speed.stream[name] for name, n in self.bytes.items())
        return 1 / (matrices + kv_bytes / speed.cache[kv_type] + self.layers * _LAYER_SECONDS)

    def prefill(self, speed: Speed) -> float:
        """Tokens a second of a prompt of :data:`PROMPT` tokens."""
        products = dict(self.products)
        products[self.head_format] -= self.head
        return 1 / sum(n / speed.products[name] for name, n in products.items())
