"""How fast a model will run here: the engine itself is timed on a few layers of its shape, a format at a time."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pyengine import quant, synthetic
from pyengine.memory import available_memory
from pyengine.model import KvType, Model, Session
from pyengine.shape import Shape

PROMPT = 512  # tokens of the prompt that prefill is forecast for
_WEIGHTS = 112 << 20  # bytes of the layers timed: several times what a last-level cache holds
_CACHE = 64 << 20  # bytes of keys and values
_MOST_LAYERS = 96
_VOCAB = 256  # tokens: the head's own cost is that of its bytes
_STEPS = 5


@dataclass(frozen=True)
class Speed:
    """What the engine does here, all threads together, norms, barriers and all.

    Attributes:
        tier: instruction sets in use; threads: that ran.
        stream: format -> bytes of weights a second, one token at a time (decode).
        products: format -> multiplications a second, a prompt of 512 tokens (prefill).
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
class Work:
    """What a token costs: bytes read and multiplications by format.

    Attributes:
        head: multiplications that make the logits, which a prompt does once; head_format: their weights'.
    """

    bytes: Mapping[str, int]
    products: Mapping[str, int]
    head: int
    head_format: str

    @classmethod
    def of(cls, table: Iterable[tuple[str, tuple[int, ...], str, int]]) -> Work:
        """Of (tensor, shape with rows first, format, bytes) of every tensor: all matrices, but the embedding only where
        it makes the logits, too."""
        matrices = [row for row in table if len(row[1]) > 1]
        tied = all(name != "output.weight" for name, _, _, _ in matrices)
        read: Counter[str] = Counter()
        products: Counter[str] = Counter()
        head = (0, "F32")
        for name, dims, fmt, size in matrices:
            if name == "token_embd.weight" and not tied:
                continue
            read[fmt] += size
            products[fmt] += math.prod(dims)
            if name in {"token_embd.weight", "output.weight"}:
                head = (math.prod(dims), fmt)
        return cls(read, products, *head)

    @classmethod
    def of_model(cls, model: Model) -> Work:
        """Of an open model."""
        tensors = model.file.tensors.values()
        return cls.of((t.name, tuple(reversed(t.dims)), t.type_name, t.size) for t in tensors)

    @property
    def total_bytes(self) -> int:
        """Of weights that a token reads."""
        return sum(self.bytes.values())

    def prompt_products(self, n: int) -> int:
        """Multiplications of a prompt of n tokens: only its last token gets logits."""
        return n * (sum(self.products.values()) - self.head) + self.head

    def decode(self, speed: Speed, kv_type: KvType, kv_bytes: int) -> float:
        """Tokens a second, one at a time, with ``kv_bytes`` of keys and values in the context."""
        matrices = sum(n / speed.stream[name] for name, n in self.bytes.items())
        return 1 / (matrices + kv_bytes / speed.cache[kv_type])

    def prefill(self, speed: Speed) -> float:
        """Tokens a second of a prompt of :data:`PROMPT` tokens."""
        products = Counter(self.products)
        products[self.head_format] -= self.head
        return 1 / sum(n / speed.products[name] for name, n in products.items())


def measure(shape: Shape, formats: Iterable[str], kv_types: Iterable[KvType], threads: int) -> Speed:
    """Times a few layers of the shape in each format, and its attention with each type of cache: some 0.3 s for each.

    Errors: ``EngineError``; ``FileError`` where there is no room for some 100 MB of random weights.
    """
    stream: dict[str, float] = {}
    products: dict[str, float] = {}
    for name in sorted(set(formats)):
        stream[name], products[name] = _weights(shape, name, threads)
    # A difference of two times can come out as next to nothing where other programs disturb; memory has its limits.
    most = 2 * max(stream.values(), default=math.inf)
    cache = {kv: min(_cache(shape, kv, threads), most) for kv in kv_types}
    return Speed(quant.tier_active(), threads, stream, products, cache)


def _weights(shape: Shape, name: str, threads: int) -> tuple[float, float]:
    """(Bytes a second of a token, multiplications a second of a prompt) of a few layers in one format."""
    few = dataclasses.replace(shape, layers=1, vocab=_VOCAB, tied=True, rope_factors=False)
    available = available_memory()
    room = _WEIGHTS if available is None else min(_WEIGHTS, available // 4)
    layer = _layer_bytes(few, name)
    while layer > 2 * room and few.ff >= 512:  # huge layers, or hardly any memory: rows of them
        few = dataclasses.replace(few, ff=few.ff // 512 * 256)
        layer = _layer_bytes(few, name)
    # A model that is smaller as a whole is timed as a whole: caches keep some of it, or all.
    few = dataclasses.replace(few, layers=max(1, min(shape.layers, math.ceil(room / layer), _MOST_LAYERS)))
    table = synthetic.uniform(few, name)
    work = Work.of((tensor, dims, fmt.name, synthetic.tensor_bytes(dims, fmt)) for tensor, dims, fmt in table)
    with synthetic.in_memory(few, table) as path, _open(path) as model, _session(model, threads, "f16") as session:
        step = _step(session)
        session.truncate(0)
        ids = [1] * min(PROMPT, few.context)
        session.prefill(ids[: PROMPT // 2])  # scratch memory is there before anything is timed
        session.truncate(0)
        return work.total_bytes / step, work.prompt_products(len(ids)) / _timed(session, ids)


def _layer_bytes(shape: Shape, name: str) -> int:
    return sum(synthetic.tensor_bytes(dims, fmt) for t, dims, fmt in synthetic.uniform(shape, name) if "blk" in t)


def _cache(shape: Shape, kv_type: KvType, threads: int) -> float:
    """Bytes of keys and values a second: what a token of a long text takes longer than the second of it.

    Many layers that are all heads and hardly anything else, so that a long cache is filled at once.
    """
    per_token = 2 * shape.kv_heads * quant.find(kv_type).row_bytes(shape.head_dim)  # of a layer
    depth = min(shape.context - 2, 512)
    while depth * 2 < shape.context and per_token * depth * _MOST_LAYERS < _CACHE:
        depth *= 2
    layers = max(1, min(math.ceil(_CACHE / (per_token * depth)), _MOST_LAYERS))
    few = dataclasses.replace(
        shape, layers=layers, embd=256, ff=256, vocab=_VOCAB, tied=True, rope_factors=False, biases=""
    )
    if shape.arch == "qwen2":
        few = dataclasses.replace(few, biases="qkv")
    table = synthetic.uniform(few, "Q8_0")
    with synthetic.in_memory(few, table) as path, _open(path) as model, _session(model, threads, kv_type) as session:
        near = _step(session)
        session.prefill([1] * (depth - len(session)))
        far = _step(session)
        return layers * per_token * depth / max(far - near, 1e-6)


def _open(path: object) -> Model:
    return Model.open(str(path), prefix_bytes=0, tokenizer_ahead=False)


def _session(model: Model, threads: int, kv_type: KvType) -> Session:
    return model.session(n_ctx=min(model.n_ctx_train, 4096), threads=threads, kv_type=kv_type)


def _step(session: Session) -> float:
    """Seconds of a token after those held: the median of some, after one that is not counted."""
    held = len(session)
    times = []
    for _ in range(_STEPS + 1):
        session.truncate(held)
        times.append(_timed(session, [1]))
    return statistics.median(times[1:])


def _timed(session: Session, ids: Sequence[int]) -> float:
    begin = time.perf_counter()
    session.eval(ids)
    return time.perf_counter() - begin
