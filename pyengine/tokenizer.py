"""Text to token ids and back, built from GGUF metadata.

The two kinds of vocabulary that decoder models use: byte-level BPE (``tokenizer.ggml.model = "gpt2"``) and
SentencePiece BPE (``"llama"``). The merging is done by Hugging Face ``tokenizers``; everything that concerns special
tokens is done here, because that is where safety lives:

* a *marker* is a control token, or a user-defined token that looks like markup (``<think>``, ``<tool_call>``). Markers
  are recognised in text only with ``parse_special=True``. They are left out of the vocabulary that the BPE sees, so
  no text whatsoever can merge into one;
* other user-defined tokens (runs of spaces, single letters) are ordinary text and are always recognised.

No Unicode normalisation is applied: the bytes that come out of ``decode`` are the bytes that went into ``encode``.
"""

from __future__ import annotations

import codecs
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import IntEnum
from itertools import repeat
from typing import Any, NamedTuple

from tokenizers import Regex, models, pre_tokenizers
from tokenizers import Tokenizer as HfTokenizer

from pyengine.errors import FormatError, InvalidArgument, UnsupportedError
from pyengine.memory import need_memory

# --- families -------------------------------------------------------------------------------------------------------

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LINES_AND_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _LINES_AND_SPACES
_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _LINES_AND_SPACES
_QWEN35 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|" + _LINES_AND_SPACES
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# The letters that the first DeepSeek tokenizer counts as words, in hexadecimal: Latin, Greek, Cyrillic and their kin.
_DEEPSEEK_LETTERS = (
    "41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376 377 37B-37D 37F 386 388-38A 38C "
    "38E-3A1 3A3-3F5 3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD 1C90-1CBA 1CBD-1CBF 1D00-1D2B "
    "1D6B-1D77 1D79-1D9A 1E00-1F15 1F18-1F1D 1F20-1F45 1F48-1F4D 1F50-1F57 1F59 1F5B 1F5D 1F5F-1F7D 1F80-1FB4 "
    "1FB6-1FBC 1FBE 1FC2-1FC4 1FC6-1FCC 1FD0-1FD3 1FD6-1FDB 1FE0-1FEC 1FF2-1FF4 1FF6-1FFC 2102 2107 210A-2113 "
    "2115 2119-211D 2124 2126 2128 212A-212D 212F-2134 2139 213C-213F 2145-2149 214E 2183 2184 2C00-2C7B "
    "2C7E-2CE4 2CEB-2CEE 2CF2 2CF3 A640-A66D A680-A69B A722-A76F A771-A787 A78B-A78E AB70-ABBF FB00-FB06 "
    "FB13-FB17 FF21-FF3A FF41-FF5A 10400-1044F 104B0-104D3 104D8-104FB 10C80-10CB2 10CC0-10CF2 118A0-118DF "
    "1E900-1E943"
)


def _char_class(ranges: str) -> str:
    """``"41-5A B5"`` as the inside of a character class."""
    return "".join("-".join(re.escape(chr(int(end, 16))) for end in item.split("-")) for item in ranges.split())


_DEEPSEEK_LLM = (
    r"[\r\n]",
    rf"\s?[{_char_class(_DEEPSEEK_LETTERS)}]+",
    r"\s?[!-/:-~\uFF01-\uFF0F\uFF1A-\uFF5E\u2018-\u201F\u3000-\u3002]+",
    r"\s+$",
    r"[\u4E00-\u9FA5\u0800-\u4E00\uAC00-\uD7FF]+",
    r"\p{N}+",
)
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[\u4E00-\u9FA5\u0800-\u4E00\uAC00-\uD7FF]+", r"\p{N}")
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    r"[\u4E00-\u9FA5\u3040-\u309F\u30A0-\u30FF]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"""
    + _LINES_AND_SPACES,
)
_FALCON = (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]")


class _Family(NamedTuple):
    """How one value of ``tokenizer.ggml.pre`` cuts text into words, and what it implies.

    The patterns are applied one after the other; each isolates its matches within the pieces the former left.
    """

    patterns: tuple[str, ...]
    ignore_merges: bool = False  # a word that is a token as a whole needs no merges
    add_bos: bool = False  # when the file does not say


_LLAMA3_FAMILY = _Family((_LLAMA3,), ignore_merges=True, add_bos=True)
_DIGITS_THEN_GPT2 = _Family((r"\p{N}", _GPT2))
_FAMILIES: Mapping[str, _Family] = {
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), _LLAMA3_FAMILY),
    **dict.fromkeys(("smaug-bpe", "dbrx"), _Family((_LLAMA3,))),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez"), _Family((_QWEN2,))),
    "qwen35": _Family((_QWEN35,)),
    "deepseek-llm": _Family(_DEEPSEEK_LLM),
    "deepseek-coder": _Family(_DEEPSEEK_CODER),
    "deepseek-v3": _Family(_DEEPSEEK_V3),
    **dict.fromkeys(("gpt-2", "mpt", "olmo", "phi-2"), _Family((_GPT2,))),
    **dict.fromkeys(("starcoder", "refact", "command-r", "smollm"), _DIGITS_THEN_GPT2),
    "falcon": _Family(_FALCON),
}

PRE_TOKENIZERS: tuple[str, ...] = tuple(_FAMILIES)
"""The values of ``tokenizer.ggml.pre`` this engine knows."""


def families() -> dict[str, tuple[tuple[str, ...], bool]]:
    """Patterns and ``ignore_merges`` of every known pre-tokenizer, by which a tokenizer.json can be recognised."""
    return {name: (family.patterns, family.ignore_merges) for name, family in _FAMILIES.items()}


class TokenType(IntEnum):
    """``tokenizer.ggml.token_type``."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


# End-of-generation tokens by name: files often name only one of theirs in `eos_token_id`. Types are checked too.
_END_NAMES = frozenset(
    (
        *("<｜end▁of▁sentence｜>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|endoftext|>", "<|end_of_text|>"),
        *("<|end|>", "<|EOT|>", "<EOT>", "<end_of_turn>", "<eos>", "</s>", "<|end_of_turn|>", "<|return|>"),
    )
)
_SPACE = "\u2581"  # SentencePiece's visible space
# What the `tokenizers` package takes at most, measured with vocabularies of 1,000 to 152,000 tokens and texts of 1 MB:
# it ends the process where it gets less.
_BUILD_BYTES, _BUILD_BYTES_PER_TOKEN = 16 << 20, 1600
_ENCODE_BYTES, _ENCODE_BYTES_PER_CHAR = 8 << 20, 300
_CACHE = 0  # words the library remembers: tokenizers 0.23 never frees them, and they save 5 % of the time
_MAX_PIECE = 512  # characters of a SentencePiece piece: generating merges is quadratic in it


def _byte_alphabet() -> dict[str, int]:
    """The character for each byte in byte-level vocabularies: itself where printable, else 256, 257, ... in order."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    table = {chr(byte): byte for byte in printable}
    for index, byte in enumerate(b for b in range(256) if b not in printable):
        table[chr(256 + index)] = byte
    return table


_BYTE_OF_CHAR = _byte_alphabet()


class _Matcher:
    """Finds given strings in text: leftmost, longest. Linear in the text for any realistic set of strings."""

    def __init__(self, ids: Mapping[str, int]) -> None:
        self._ids = ids
        lengths: dict[str, set[int]] = {}
        for text in ids:
            lengths.setdefault(text[:2], set()).add(len(text))
        # Lengths to try at a position, longest first, by the two characters there (one where the string has only one).
        self._lengths = {prefix: sorted(found, reverse=True) for prefix, found in lengths.items()}
        first = sorted({text[0] for text in ids})
        self._first = re.compile("[" + "".join(map(re.escape, first)) + "]") if first else None

    def match_at(self, text: str, at: int) -> str | None:
        """The longest known string that starts at ``at``."""
        for prefix in (text[at : at + 2], text[at]):
            for length in self._lengths.get(prefix, ()):
                if text[at : at + length] in self._ids and at + length <= len(text):
                    return text[at : at + length]
        return None

    def split(self, text: str) -> Iterable[tuple[str, int | None]]:
        """Yields ``(piece, id)``: the id for a known string, None for the text between."""
        start = at = 0
        while self._first is not None and (hit := self._first.search(text, at)) is not None:
            found = self.match_at(text, hit.start())
            if found is None:
                at = hit.end()
                continue
            if hit.start() > start:
                yield text[start : hit.start()], None
            yield found, self._ids[found]
            start = at = hit.start() + len(found)
        if start < len(text):
            yield text[start:], None


class TextStream:
    """Turns ids into text one at a time and never splits a character: see :meth:`Tokenizer.stream`."""

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool, start: bool) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._strip_space = start and tokenizer.adds_space
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int) -> str:
        """The text that ``token`` completes; ``""`` while a character is unfinished."""
        control = self._tokenizer.is_control(token)
        data = b"" if control and self._skip_special else self._tokenizer.token_bytes(token)
        if self._strip_space and not control:
            self._strip_space = False
            data = data.removeprefix(b" ")
        return self._decoder.decode(data)

    def flush(self) -> str:
        """What an unfinished character leaves: U+FFFD or nothing. The stream can be used again afterwards."""
        return self._decoder.decode(b"", final=True)


class Tokenizer:
    """A vocabulary. Immutable; may be shared by threads. Ids are ints in ``[0, n_vocab)``.

    Attributes:
        n_vocab: number of tokens.
        model: ``"gpt2"`` (byte-level BPE) or ``"llama"`` (SentencePiece BPE).
        pre: name of the pre-tokenizer in use; ``""`` for SentencePiece.
        bos_id, eos_id: ids or None.
        eog_ids: every id that ends a generation.
        add_bos, add_eos: whether ``encode(add_special=True)`` adds them.
        adds_space: whether encoding puts a space before the text (SentencePiece).
        special_strings: text to id of every marker.
    """

    def __init__(self, metadata: Mapping[str, Any], *, override: str | None = None) -> None:
        self.model: str = _get(metadata, "model", str, required=True)
        self._tokens = _texts(metadata, "tokens")
        self.n_vocab = len(self._tokens)
        self._types = _token_types(metadata, self.n_vocab)
        self.bos_id = self._id(metadata, "bos_token_id")
        self.eos_id = self._id(metadata, "eos_token_id")
        # Files type these wrongly at times; but some also name ordinary text here (a comma as BOS), which stays text.
        for special in (self.bos_id, self.eos_id):
            if special is not None and _looks_like_markup(self._tokens[special]):
                self._types[special] = TokenType.CONTROL
        self._special = [i for i, kind in enumerate(self._types) if kind != 1]  # NORMAL, spelt out for speed
        self.eog_ids = self._find_eog(metadata)
        self.special_strings = self._select(self.is_marker)
        self._markers = _Matcher(self.special_strings)
        plain = self._select(lambda i: self._types[i] == TokenType.USER_DEFINED and not self.is_marker(i))
        self._plain = _Matcher(plain)
        self._both = _Matcher({**plain, **self.special_strings})
        self.pre = ""
        self.adds_space = False
        if self.model == "gpt2":
            self._bpe, add_bos = self._build_byte_level(metadata, override)
        elif self.model == "llama":
            self.adds_space = bool(_get(metadata, "add_space_prefix", bool, default=True))
            self._bpe, add_bos = self._build_sentencepiece(metadata), True
        else:
            raise UnsupportedError(
                f"the tokenizer type {self.model!r} is not supported; known are 'gpt2' (byte-level BPE) and 'llama' "
                "(SentencePiece BPE)",
                code="unknown_tokenizer",
                field="tokenizer.ggml.model",
            )
        self.add_bos: bool = _get(metadata, "add_bos_token", bool, default=add_bos and self.bos_id is not None)
        self.add_eos: bool = _get(metadata, "add_eos_token", bool, default=False)
        for flag, special, key in ((self.add_bos, self.bos_id, "bos"), (self.add_eos, self.eos_id, "eos")):
            if flag and special is None:
                raise _bad(f"add_{key}_token", f"asks for a token, but {key}_token_id is missing")
        self._bytes: list[bytes | None] = [None] * self.n_vocab
        for token in self._special:
            if self._types[token] == TokenType.BYTE:
                self.token_bytes(token)  # raises here rather than in the middle of a generation

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any], *, override: str | None = None) -> Tokenizer:
        """Builds the tokenizer from the metadata of a GGUF file.

        Args:
            metadata: GGUF keys and values; ``tokenizer.ggml.*`` is read.
            override: a name from :data:`PRE_TOKENIZERS` to use instead of the file's ``tokenizer.ggml.pre``.

        Raises:
            FormatError: keys are missing, have wrong types or lengths, or contradict each other.
            UnsupportedError: the type of tokenizer or its pre-tokenizer is unknown.
        """
        return cls(metadata, override=override)

    @classmethod
    def from_gguf(cls, path: str | os.PathLike[str], *, override: str | None = None) -> Tokenizer:
        """The tokenizer of a GGUF file, vocabulary-only files included. Errors: those of the reader, and above."""
        from pyengine.gguf_file import GgufFile  # here, so that a tokenizer can be built without the native module

        with GgufFile.open(path, load="header") as file:
            return cls(file.metadata, override=override)

    # --- encoding ---

    def encode(self, text: str, *, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """Token ids of ``text``.

        Args:
            text: any text that is valid Unicode.
            add_special: put BOS before and EOS behind where the vocabulary asks for it.
            parse_special: recognise markers in the text. Never set it for text that a user wrote.

        Raises:
            InvalidArgument: ``text`` holds a lone surrogate, as left by decoding invalid UTF-8 leniently.
        """
        _check_text(text)
        ids: list[int] = []
        if add_special and self.add_bos and self.bos_id is not None:
            ids.append(self.bos_id)
        for piece, token in (self._both if parse_special else self._plain).split(text):
            if token is None:
                ids += self._encode_plain(piece)
            else:
                ids.append(token)
        if add_special and self.add_eos and self.eos_id is not None:
            ids.append(self.eos_id)
        return ids

    def _encode_plain(self, text: str) -> list[int]:
        if self.model == "llama":
            text = (_SPACE if self.adds_space else "") + text.replace(" ", _SPACE)
        need_memory(_ENCODE_BYTES + _ENCODE_BYTES_PER_CHAR * len(text), "the tokenizer")
        ids: list[int] = self._bpe.encode(text, add_special_tokens=False).ids
        return ids

    def split_special(self, text: str) -> Iterable[tuple[str, int | None]]:
        """Cuts ``text`` at markers: yields ``(piece, id)``, the id None for the text between."""
        return self._markers.split(text)

    # --- decoding ---

    def decode(self, ids: Iterable[int], *, skip_special: bool = False, start: bool = True) -> str:
        """Text of ``ids``; bytes that are no valid UTF-8 become U+FFFD. Inverse of ``encode(add_special=False)``.

        Args:
            ids: token ids.
            skip_special: leave control tokens out.
            start: the ids begin a text, so drop the space that SentencePiece put before it. False for a continuation.

        Raises:
            InvalidArgument: an id is outside the vocabulary.
        """
        stream = TextStream(self, skip_special=skip_special, start=start)
        return "".join([*map(stream.feed, ids), stream.flush()])

    def stream(self, *, skip_special: bool = False, start: bool = False) -> TextStream:
        """A decoder for ids that arrive one by one; with equal arguments its pieces join to :meth:`decode`'s text.

        ``start`` is False here by default because what streams is the continuation of a prompt.
        """
        return TextStream(self, skip_special=skip_special, start=start)

    def token_bytes(self, token: int) -> bytes:
        """The bytes a token stands for. Control tokens give their name; unused ones nothing."""
        cached = self._bytes[self._check_id(token)]
        if cached is None:
            cached = self._bytes[token] = self._make_bytes(token)
        return cached

    def _make_bytes(self, token: int) -> bytes:
        text, kind = self._tokens[token], self._types[token]
        if kind == TokenType.UNUSED:
            return b""
        if kind == TokenType.BYTE:
            return bytes([_byte_value(text)])
        if kind == TokenType.NORMAL and self.model == "llama":
            return text.replace(_SPACE, " ").encode()
        if kind == TokenType.NORMAL:
            return b"".join(bytes([_BYTE_OF_CHAR[c]]) if c in _BYTE_OF_CHAR else c.encode() for c in text)
        return text.encode()

    def piece(self, token: int) -> str:
        """One token as text for people: its bytes, with U+FFFD where they are no whole characters."""
        return self.token_bytes(token).decode("utf-8", "replace")

    def is_control(self, token: int) -> bool:
        """True for tokens that frame text and are no part of it: BOS, EOS, turn markers, unknown."""
        return self._types[self._check_id(token)] in (TokenType.CONTROL, TokenType.UNKNOWN)

    def is_marker(self, token: int) -> bool:
        """True for control tokens, and for user-defined ones that look like markup, such as ``<think>``."""
        self._check_id(token)
        text, kind = self._tokens[token], self._types[token]
        if kind == TokenType.USER_DEFINED:
            return _looks_like_markup(text)
        # One character could not be told from text; such a token has no name that text can call it by.
        return kind in (TokenType.CONTROL, TokenType.UNKNOWN) and len(text) > 1

    def token_id(self, text: str) -> int | None:
        """The id of the marker with exactly this text, such as ``"</think>"``, or None."""
        return self.special_strings.get(text)

    # --- construction ---

    def _check_id(self, token: int) -> int:
        if not 0 <= token < self.n_vocab:
            raise InvalidArgument(f"token id {token} is outside the vocabulary of {self.n_vocab}", code="bad_token")
        return token

    def _id(self, metadata: Mapping[str, Any], name: str) -> int | None:
        value: int | None = _get(metadata, name, int)
        if value is not None and not 0 <= value < self.n_vocab:
            raise _bad(name, f"is {value}, outside the vocabulary of {self.n_vocab}")
        return value

    def _select(self, keep: Callable[[int], bool]) -> dict[str, int]:
        """Text to id of the special tokens that ``keep`` accepts; of equal texts the first counts."""
        chosen: dict[str, int] = {}
        for token in self._special:
            if self._tokens[token] and keep(token):
                chosen.setdefault(self._tokens[token], token)
        return chosen

    def _find_eog(self, metadata: Mapping[str, Any]) -> frozenset[int]:
        found = {self.eos_id, self._id(metadata, "eot_token_id"), self._id(metadata, "eom_token_id")}
        special = (TokenType.CONTROL, TokenType.USER_DEFINED)
        found |= {i for i in self._special if self._types[i] in special and self._tokens[i] in _END_NAMES}
        return frozenset(i for i in found if i is not None)

    def _mergeable(self) -> dict[str, int]:
        """The tokens that text may become by merging."""
        vocab = dict(zip(self._tokens, range(self.n_vocab), strict=True))
        barred = [i for i in self._special if self._types[i] in (TokenType.CONTROL, TokenType.UNKNOWN)]
        if len(vocab) != self.n_vocab:  # duplicates: harmless where only one of them can be reached
            vocab = {}
            hidden = set(barred)
            for token, text in enumerate(self._tokens):
                if text and token not in hidden and vocab.setdefault(text, token) != token:
                    raise _bad("tokens", f"{text!r} appears twice, as {vocab[text]} and {token}")
        for token in barred:
            if vocab.get(self._tokens[token]) == token:
                del vocab[self._tokens[token]]
        for text in ("", *self.special_strings):
            vocab.pop(text, None)
        return vocab

    def _build_byte_level(self, metadata: Mapping[str, Any], override: str | None) -> tuple[HfTokenizer, bool]:
        self.pre = override or _get(metadata, "pre", str, default="")
        family = _FAMILIES.get(self.pre)
        if family is None:
            found = f"the pre-tokenizer {self.pre!r} is unknown" if self.pre else "the file names no pre-tokenizer"
            raise UnsupportedError(
                f"{found}; known are {', '.join(PRE_TOKENIZERS)}. If one of them is right for this model, force it "
                "(tokenizer.ggml.pre)",
                code="unknown_pretokenizer",
                field="tokenizer.ggml.pre",
            )
        texts = _texts(metadata, "merges")  # 280,000 of them: in loops of C, as far as it goes
        merges = [(left, right) for left, _, right in map(str.partition, texts, repeat(" "))]
        vocab = self._mergeable()
        merged = map(str.replace, texts, repeat(" "), repeat(""), repeat(1))
        if not all(map(vocab.__contains__, merged)):  # the library panics over some of these
            lost = next(pair for pair in merges if pair[0] + pair[1] not in vocab)
            raise _bad("merges", f"do not fit the tokens: {lost[0]!r} and {lost[1]!r} make no token")
        need_memory(_BUILD_BYTES + _BUILD_BYTES_PER_TOKEN * self.n_vocab, "the tokenizer")
        try:
            bpe = models.BPE(vocab, merges, cache_capacity=_CACHE, ignore_merges=family.ignore_merges)
        except MemoryError:
            raise
        except Exception as error:  # the library raises plain Exception for a merge of what is no token
            raise _bad("merges", f"do not fit the tokens: {error}") from error
        tokenizer = HfTokenizer(bpe)
        splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in family.patterns]
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
        return tokenizer, family.add_bos

    def _build_sentencepiece(self, metadata: Mapping[str, Any]) -> HfTokenizer:
        scores = list(map(float, _get(metadata, "scores", Sequence, required=True)))
        if len(scores) != self.n_vocab:
            raise _bad("scores", f"has {len(scores)} entries for {self.n_vocab} tokens")
        if not all(map(math.isfinite, scores)):
            raise _bad("scores", "holds a value that is not finite")
        vocab = self._mergeable()
        unknown = _get(metadata, "unknown_token_id", int)
        unk = self._tokens[self._id(metadata, "unknown_token_id") or 0] if unknown is not None else None
        if unk is not None:
            vocab[unk] = unknown  # no merge leads to it; it stands for characters that have no byte tokens
        merges = _merges_from_scores(vocab, scores, self._types)
        need_memory(_BUILD_BYTES + _BUILD_BYTES_PER_TOKEN * self.n_vocab, "the tokenizer")
        try:
            bpe = models.BPE(vocab, merges, cache_capacity=_CACHE, unk_token=unk, fuse_unk=True, byte_fallback=True)
        except MemoryError:
            raise
        except Exception as error:
            raise _bad("tokens", f"make no vocabulary: {error}") from error
        return HfTokenizer(bpe)


def _merges_from_scores(
    vocab: Mapping[str, int], scores: Sequence[float], types: Sequence[int]
) -> list[tuple[str, str]]:
    """SentencePiece merges the pair whose result scores best; as BPE that is a list of pairs by falling score."""
    pairs: list[tuple[float, int, int, str, str]] = []
    for text, token in vocab.items():
        if types[token] != TokenType.NORMAL:
            continue
        if len(text) > _MAX_PIECE:
            raise _bad("tokens", f"token {token} is longer than {_MAX_PIECE} characters")
        for cut in range(1, len(text)):
            left, right = vocab.get(text[:cut]), vocab.get(text[cut:])
            if left is not None and right is not None:
                pairs.append((-scores[token], left, right, text[:cut], text[cut:]))
    pairs.sort()
    return [(left, right) for _, _, _, left, right in pairs]


def _bad(name: str, problem: str) -> FormatError:
    key = f"tokenizer.ggml.{name}"
    return FormatError(f"{key} {problem}", code="bad_vocabulary", field=key)


def _get(metadata: Mapping[str, Any], name: str, kind: type, *, required: bool = False, default: Any = None) -> Any:
    value = metadata.get(f"tokenizer.ggml.{name}")
    if value is None:
        if required:
            raise _bad(name, "is missing")
        return default
    is_array = not isinstance(value, (str, bytes)) and hasattr(value, "__len__") and hasattr(value, "__getitem__")
    fits = is_array if kind is Sequence else isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    if not fits:
        raise _bad(name, f"has the wrong type ({type(value).__name__})")
    return value


def _texts(metadata: Mapping[str, Any], name: str) -> list[str]:
    value = _get(metadata, name, Sequence, required=True)
    if not isinstance(value, list) or (value and not isinstance(value[0], str)):  # arrays are of one type
        raise _bad(name, "is no array of texts")
    return value


def _token_types(metadata: Mapping[str, Any], n_vocab: int) -> list[int]:
    value = _get(metadata, "token_type", Sequence)
    if value is None:  # optional in the format: every token is then plain text, but for those named by id
        return [int(TokenType.NORMAL)] * n_vocab
    types: list[int] = value.tolist() if hasattr(value, "tolist") else list(value)
    if len(types) != n_vocab:
        raise _bad("token_type", f"has {len(types)} entries for {n_vocab} tokens")
    unknown = set(types) - set(TokenType)
    if unknown:
        raise _bad("token_type", f"holds the unknown type {sorted(unknown)[0]}")
    return types


def _looks_like_markup(text: str) -> bool:
    return len(text) > 2 and (text[0] + text[-1]) in ("<>", "[]")


def _byte_value(text: str) -> int:
    match = re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", text)
    if match is None:
        raise _bad("tokens", f"{text!r} is typed as a byte but is not of the form <0xNN>")
    return int(match[1], 16)


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidArgument(
            f"the text is not valid Unicode: lone surrogate U+{ord(text[error.start]):04X} at character {error.start} "
            "(the input was probably not UTF-8)",
            code="invalid_text",
        ) from None
