"""The tokenizer of a checkpoint as GGUF metadata.

Three sources: a byte-level BPE ``tokenizer.json``; a SentencePiece ``tokenizer.model``; a ``tokenizer.json`` made from
a SentencePiece model (BPE with byte fallback) where the model itself is absent.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pyengine.errors import FileError, FormatError, UnsupportedError
from pyengine.tokenizer import TokenType
from pyengine_convert.keyvalues import KeyValues
from pyengine_convert.pretokenizer import is_byte_level, recognise
from pyengine_convert.sentencepiece_model import read_sentencepiece
from pyengine_convert.source import Config, read_json, read_json_if_present, read_text

_ADDED_SCORE = -1000.0  # of tokens a SentencePiece model got later; the custom of GGUF files. Never used to merge
# Added tokens written like this are turn markers even where a tokenizer does not flag them as special.
_MARKER = re.compile(r"<\|.*\|>|<｜.*｜>", re.DOTALL)


@dataclass
class Vocabulary:
    """Tokens in id order and what belongs to them.

    Attributes:
        model: "gpt2" (byte-level BPE) or "llama" (SentencePiece BPE).
        pre: name of the pre-tokenizer; "default" for SentencePiece.
        tokens, types: text and token type of each id; scores: for "llama"; merges: for "gpt2", joined with a space.
        add_space_prefix: for "llama".
        ids: special ids by GGUF's names (bos, eos, eot, eom, unknown, padding).
        add_bos, add_eos: whether encoding adds them.
        templates: chat templates by name; "default" is the one that is used.
        notes: what a careful user should know.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] = field(default_factory=list)
    merges: list[str] = field(default_factory=list)
    add_space_prefix: bool = True
    ids: dict[str, int] = field(default_factory=dict)
    add_bos: bool = False
    add_eos: bool = False
    templates: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def write(self, keys: KeyValues) -> None:
        """Adds the ``tokenizer.*`` keys."""
        keys.string("tokenizer.ggml.model", self.model)
        keys.string("tokenizer.ggml.pre", self.pre)
        keys.strings("tokenizer.ggml.tokens", self.tokens)
        keys.f32s("tokenizer.ggml.scores", self.scores)
        keys.i32s("tokenizer.ggml.token_type", self.types)
        keys.strings("tokenizer.ggml.merges", self.merges)
        for name, token in self.ids.items():
            keys.u32(f"tokenizer.ggml.{name}_token_id", token)
        keys.flag("tokenizer.ggml.add_bos_token", self.add_bos)
        keys.flag("tokenizer.ggml.add_eos_token", self.add_eos)
        if self.model == "llama":
            keys.flag("tokenizer.ggml.add_space_prefix", self.add_space_prefix)
        others = sorted(name for name in self.templates if name != "default")
        for name in others:
            keys.string(f"tokenizer.chat_template.{name}", self.templates[name])
        keys.strings("tokenizer.chat_templates", others)
        if "default" in self.templates:
            keys.string("tokenizer.chat_template", self.templates["default"])


def read_vocabulary(folder: Path, config: Config, rows: int, pre: str | None = None) -> Vocabulary:
    """The vocabulary of a checkpoint, padded with unused tokens to the ``rows`` of its embedding.

    ``pre`` names the pre-tokenizer instead of recognising it.
    Errors: ``FileError``, ``FormatError``, ``UnsupportedError``.
    """
    settings = Config(read_json_if_present(folder / "tokenizer_config.json"), "tokenizer_config.json")
    fast = read_json_if_present(folder / "tokenizer.json")
    try:
        return _read_vocabulary(folder, config, settings, fast, rows, pre)
    except (AttributeError, IndexError, KeyError, TypeError) as error:  # objects where lists belong, and the like
        raise FormatError(
            f"{folder / 'tokenizer.json'} is not built as tokenizers are ({type(error).__name__}: {error})",
            code="bad_tokenizer",
        ) from error


def _read_vocabulary(
    folder: Path, config: Config, settings: Config, fast: Mapping[str, Any], rows: int, pre: str | None
) -> Vocabulary:
    if fast and not isinstance(fast.get("model"), dict):
        raise FormatError("tokenizer.json has no model", code="bad_tokenizer", field="model")
    added = _added_tokens(fast, settings)
    template = _post_processor(fast)
    if fast and is_byte_level(fast):
        vocabulary = _byte_level(fast, added, rows, pre or recognise(fast, template.bos is not None))
    elif (folder / "tokenizer.model").exists():
        vocabulary = _sentencepiece(folder / "tokenizer.model", added, rows)
    elif fast and fast["model"].get("byte_fallback"):
        vocabulary = _sentencepiece_json(fast, added, rows)
    elif fast:
        kind = fast["model"].get("type")
        raise UnsupportedError(f"tokenizer.json is of type {kind}; expected BPE", code="unsupported_tokenizer")
    else:
        raise FileError(f"{folder} has neither tokenizer.json nor tokenizer.model", code="no_tokenizer")
    _read_special_ids(vocabulary, folder, config, settings, template)
    _read_templates(vocabulary, folder, settings)
    return vocabulary


# --- tokens -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Added:
    text: str
    special: bool

    @property
    def type(self) -> TokenType:
        control = self.special or _MARKER.fullmatch(self.text)
        return TokenType.CONTROL if control else TokenType.USER_DEFINED


def _added_tokens(fast: Mapping[str, Any], settings: Config) -> dict[int, _Added]:
    """Tokens added to the trained vocabulary, by id, from both files that may list them."""
    listed = [(entry.get("id"), entry) for entry in fast.get("added_tokens") or []]
    listed += [(key, entry) for key, entry in settings.section("added_tokens_decoder").values.items()]
    added: dict[int, _Added] = {}
    for key, entry in listed:
        text = entry.get("content") if isinstance(entry, dict) else None
        if not isinstance(text, str) or not str(key).isdecimal():
            raise FormatError(f"an added token is damaged: {entry!r}", code="bad_tokenizer", field="added_tokens")
        added.setdefault(int(key), _Added(text, bool(entry.get("special"))))
    return added


def _fill(tokens: Mapping[int, tuple[str, int]], rows: int) -> tuple[list[str], list[int]]:
    """Lists of length ``rows``; ids without a token become unused ones."""
    if tokens and max(tokens) >= rows:
        beyond = sorted(i for i in tokens if i >= rows)
        raise FormatError(
            f"the tokenizer has ids up to {beyond[-1]} ({tokens[beyond[-1]][0]!r}); the embedding has {rows} rows, "
            f"too few by {len(beyond)} tokens: the tokenizer is another model's, or the embedding was not resized",
            code="vocabulary_too_large",
        )
    filled = [tokens.get(i, (f"[PAD{i}]", TokenType.UNUSED)) for i in range(rows)]
    return [text for text, _ in filled], [int(kind) for _, kind in filled]


def _vocab_by_id(fast: Mapping[str, Any]) -> dict[int, str]:
    vocab = fast["model"].get("vocab")
    if not isinstance(vocab, dict) or not all(isinstance(i, int) and i >= 0 for i in vocab.values()):
        raise FormatError(
            "tokenizer.json: model.vocab is not an object of text: id", code="bad_tokenizer", field="vocab"
        )
    by_id = {i: text for text, i in vocab.items()}
    if len(by_id) != len(vocab):
        raise FormatError("tokenizer.json: two tokens share an id", code="bad_tokenizer", field="vocab")
    return by_id


def _merges(fast: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Merges as pairs; files write them as pairs or joined by a space."""
    pairs = []
    for merge in fast["model"].get("merges") or []:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(isinstance(p, str) and p for p in pair):
            raise FormatError(
                f"tokenizer.json: a merge is {merge!r}; expected two tokens", code="bad_merge", field="merges"
            )
        pairs.append((pair[0], pair[1]))
    return pairs


def _byte_level(fast: Mapping[str, Any], added: Mapping[int, _Added], rows: int, pre: str) -> Vocabulary:
    tokens: dict[int, tuple[str, int]] = {i: (text, TokenType.NORMAL) for i, text in _vocab_by_id(fast).items()}
    tokens.update({i: (token.text, token.type) for i, token in added.items()})
    merges = _merges(fast)
    if broken := next((pair for pair in merges if " " in "".join(pair)), None):
        raise FormatError(f"tokenizer.json: a merge of byte-level BPE has a space: {broken!r}", code="bad_merge")
    texts, types = _fill(tokens, rows)
    return Vocabulary("gpt2", pre, texts, types, merges=[" ".join(pair) for pair in merges])


def _sentencepiece(path: Path, added: Mapping[int, _Added], rows: int) -> Vocabulary:
    model = read_sentencepiece(path)
    tokens = {i: (text, kind) for i, (text, _, kind) in enumerate(model.pieces)}
    scores = {i: score for i, (_, score, _) in enumerate(model.pieces)}
    _add_to_pieces(tokens, scores, added)
    texts, types = _fill(tokens, rows)
    scored = [scores.get(i, _ADDED_SCORE) for i in range(rows)]
    vocabulary = Vocabulary("llama", "default", texts, types, scores=scored, add_space_prefix=model.add_dummy_prefix)
    if model.remove_extra_whitespaces:
        vocabulary.notes.append("tokenizer.model joins runs of spaces; readers of GGUF, as transformers, keep them")
    return vocabulary


def _add_to_pieces(tokens: dict[int, tuple[str, int]], scores: dict[int, float], added: Mapping[int, _Added]) -> None:
    """Adds later tokens; the model's own unknown, control and byte pieces stay as they are."""
    for i, token in added.items():
        if tokens.get(i, ("", TokenType.NORMAL))[1] in (TokenType.UNKNOWN, TokenType.CONTROL, TokenType.BYTE):
            continue
        tokens[i] = (token.text, token.type)
        scores[i] = _ADDED_SCORE


def _sentencepiece_json(fast: Mapping[str, Any], added: Mapping[int, _Added], rows: int) -> Vocabulary:
    """From BPE with byte fallback: a piece's score is minus the rank of the first merge that makes it."""
    unknown = fast["model"].get("unk_token")
    tokens: dict[int, tuple[str, int]] = {}
    scores: dict[int, float] = {}
    rank = _ranks(_merges(fast))
    for i, text in _vocab_by_id(fast).items():
        if text == unknown:
            tokens[i] = (text, TokenType.UNKNOWN)
        elif re.fullmatch(r"<0x[0-9A-F]{2}>", text):
            tokens[i] = (text, TokenType.BYTE)
        else:
            tokens[i] = (text, TokenType.NORMAL)
        scores[i] = -float(rank.get(text, 0))
    _add_to_pieces(tokens, scores, added)
    texts, types = _fill(tokens, rows)
    scored = [scores.get(i, _ADDED_SCORE) for i in range(rows)]
    return Vocabulary("llama", "default", texts, types, scores=scored, add_space_prefix=_prepends_space(fast))


def _ranks(merges: Sequence[tuple[str, str]]) -> dict[str, int]:
    """Piece -> position of its merges. GGUF has one score a piece, so the merges of a piece must stand together."""
    rank: dict[str, int] = {}
    previous = None
    for i, (left, right) in enumerate(merges):
        piece = left + right
        if piece != previous and piece in rank:
            raise UnsupportedError(
                f"tokenizer.json: the merges of {piece!r} do not stand together, so scores cannot express their order; "
                "put the SentencePiece tokenizer.model beside it",
                code="unsupported_tokenizer",
                field="merges",
            )
        rank.setdefault(piece, i)
        previous = piece
    return rank


def _prepends_space(fast: Mapping[str, Any]) -> bool:
    """Whether a text gets a space in front. ``UnsupportedError`` for steps that SentencePiece readers do not take."""
    steps: list[Any] = []
    for kind in ("normalizer", "pre_tokenizer"):
        node = fast.get(kind) or {"type": "Sequence"}
        steps += node.get(kind.replace("_", "") + "s", []) if node["type"] == "Sequence" else [node]
    for step in steps:
        if step["type"] not in ("Prepend", "Replace", "Metaspace"):
            raise UnsupportedError(
                f"tokenizer.json has the step {step['type']}, which GGUF cannot express", code="unsupported_tokenizer"
            )
    for step in steps:
        if step.get("type") == "Prepend" and step.get("prepend") == "\u2581":
            return True
        if step.get("type") == "Metaspace":
            return bool(step.get("prepend_scheme", "always") != "never" and step.get("add_prefix_space", True))
    return False


# --- special ids ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Template:
    """Ids that the post-processor of a tokenizer.json puts before and behind a text; None for none."""

    bos: int | None
    eos: int | None


def _post_processor(fast: Mapping[str, Any]) -> _Template:
    node = fast.get("post_processor")
    nodes = node.get("processors", [node]) if isinstance(node, dict) else []
    for step in nodes:
        if step.get("type") != "TemplateProcessing":
            continue
        table = step.get("special_tokens", {})
        single = [
            table[part["SpecialToken"]["id"]]["ids"][0] if "SpecialToken" in part else None
            for part in step.get("single", [])
        ]
        text = single.index(None) if None in single else len(single)
        return _Template(single[0] if text > 0 else None, single[-1] if text < len(single) - 1 else None)
    return _Template(None, None)


def _read_special_ids(
    vocabulary: Vocabulary, folder: Path, config: Config, settings: Config, template: _Template
) -> None:
    """Ids by what a text really gets: the post-processor, the tokenizer's settings, then the model's configurations."""
    generation = Config(read_json_if_present(folder / "generation_config.json"), "generation_config.json")
    named = {kind: _named_id(vocabulary, settings, kind) for kind in ("bos", "eos", "pad", "unk")}
    ends = [*_id_list(generation, "eos_token_id"), *_id_list(config, "eos_token_id")]
    first = {
        "bos": [template.bos, named["bos"], *_id_list(generation, "bos_token_id"), *_id_list(config, "bos_token_id")],
        "eos": [named["eos"], template.eos, *ends],
        "unknown": [named["unk"], *(i for i, kind in enumerate(vocabulary.types) if kind == TokenType.UNKNOWN)],
        "padding": [named["pad"], *_id_list(generation, "pad_token_id"), *_id_list(config, "pad_token_id")],
    }
    for name, candidates in first.items():
        chosen = next((i for i in candidates if i is not None), None)
        if chosen is not None:
            vocabulary.ids[name] = _checked_id(chosen, name, vocabulary)
    _read_other_ends(vocabulary, ends)
    sentencepiece = vocabulary.model == "llama"
    vocabulary.add_bos = settings.boolean(
        "add_bos_token", template.bos is not None or (sentencepiece and not template.eos)
    )
    vocabulary.add_eos = settings.boolean("add_eos_token", template.eos is not None)
    for flag, name in ((vocabulary.add_bos, "bos"), (vocabulary.add_eos, "eos")):
        if flag and name not in vocabulary.ids:
            raise FormatError(f"the tokenizer adds a {name.upper()} token, but none is named", code="bad_tokenizer")


def _read_other_ends(vocabulary: Vocabulary, ends: Sequence[int]) -> None:
    """generation_config may list several ends; GGUF has room for three: eos, end of turn, end of message."""
    others = [i for i in dict.fromkeys(ends) if i != vocabulary.ids.get("eos")]
    others = [_checked_id(i, "eos", vocabulary) for i in others]
    others.sort(key=lambda i: "eom" in vocabulary.tokens[i])  # stable: a token named "eom" is the end of message
    for name, token in zip(("eot", "eom"), others, strict=False):
        vocabulary.ids[name] = token
    if len(others) > 2:
        left = ", ".join(vocabulary.tokens[i] for i in others[2:])
        vocabulary.notes.append(f"more ends of generation than GGUF has keys for; left out: {left}")


def _named_id(vocabulary: Vocabulary, settings: Config, kind: str) -> int | None:
    """The id of, say, tokenizer_config's eos_token, written as text or as {"content": text}."""
    value = settings.get(f"{kind}_token")
    text = value.get("content") if isinstance(value, dict) else value
    if text is None:
        return None
    if not isinstance(text, str):
        raise settings.bad(f"{kind}_token", value, "a token")
    try:
        return vocabulary.tokens.index(text)
    except ValueError:
        vocabulary.notes.append(f"tokenizer_config.json: {kind}_token {text!r} is not in the vocabulary; ignored")
        return None


def _id_list(config: Config, key: str) -> list[int]:
    value = config.get(key, [])
    values = value if isinstance(value, list) else [value]
    if any(isinstance(v, bool) or not isinstance(v, int) for v in values):
        raise config.bad(key, value, "an id or a list of ids")
    return [v for v in values if v >= 0]  # -1 means none in old files


def _checked_id(token: int, name: str, vocabulary: Vocabulary) -> int:
    if token >= len(vocabulary.tokens):
        raise FormatError(
            f"the {name} id is {token}; the vocabulary has {len(vocabulary.tokens)} tokens",
            code="bad_special_id",
            field=name,
        )
    return token


# --- chat templates ---------------------------------------------------------------------------------------------------


def _read_templates(vocabulary: Vocabulary, folder: Path, settings: Config) -> None:
    """From chat_template.jinja, chat_template.json or tokenizer_config.json, in this order, as transformers does."""
    value: Any = settings.get("chat_template")
    if (folder / "chat_template.json").exists():
        value = read_json(folder / "chat_template.json").get("chat_template", value)
    if (folder / "chat_template.jinja").exists():
        value = read_text(folder / "chat_template.jinja")
    listed = value if isinstance(value, list) else [{"name": "default", "template": value}] if value else []
    for entry in listed:
        if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in ("name", "template")):
            raise settings.bad("chat_template", value, "text, or a list of {name, template}")
        vocabulary.templates[re.sub(r"[^A-Za-z0-9]", "_", entry["name"])] = entry["template"]
