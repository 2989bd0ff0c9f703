"""From messages to token ids: the model's chat template, and a guard that keeps people's words from becoming markers.

The guard: before rendering, every marker (``<|im_end|>``, ``<think>``, ...) inside message text gets an invisible
character after each of its own; the rendered text is cut at the markers that are still whole, which are the template's,
and the invisible characters are removed from the pieces between. It works for templates that trim, split or
JSON-encode what they are given, and costs nothing where there is nothing to guard.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from pyengine.errors import InvalidArgument, UnsupportedError
from pyengine.reasoning import CLOSER, OPENER
from pyengine.template import Template, to_json
from pyengine.tokenizer import Tokenizer

Message = Mapping[str, Any]
"""A chat message as everyone writes them: ``{"role": "user", "content": "Hello"}``."""

# Budget of a rendering (see pyengine.template). Published templates take under 100 steps for each message, so this
# leaves room for ones that look at all messages for each message, and for ones that split long texts.
_STEPS, _STEPS_PER_MESSAGE, _STEPS_PER_CHAR = 100_000, 10_000, 2
_CHARS, _CHARS_PER_CHAR = 4 << 20, 64

_ROLE = re.compile(r"[A-Za-z0-9_.-]{1,64}")  # templates print roles inside markers, so they must be nothing but names

BUILTIN_TEMPLATES: Mapping[str, str] = {
    "chatml": (
        "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' "
        "+ message.content.strip() + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
    ),
    "deepseek-r1": (
        "{{ bos_token }}{% for message in messages %}"
        "{% if message.role == 'user' %}{{ '<｜User｜>' + message.content }}"
        "{% elif message.role == 'assistant' %}"
        "{{ '<｜Assistant｜>' + message.content.split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}"
        "{% else %}{{ message.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\n' }}{% endif %}"
    ),
}
"""Templates by name, for files that carry none."""

# The markers that say which of them a model without a template was trained with.
_TELLTALES: Mapping[str, tuple[str, ...]] = {
    "deepseek-r1": ("<｜User｜>", "<｜Assistant｜>", OPENER),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "chatml": ("<|im_start|>", "<|im_end|>"),
}


class ChatTemplate:
    """A model's chat template. Immutable; may be shared by threads.

    Attributes:
        source: the Jinja source.
        origin: where it comes from, in words, for ``--verbose``.
        bos, eos: texts the template knows as ``bos_token`` and ``eos_token``.
    """

    def __init__(self, source: str, bos: str = "", eos: str = "", *, origin: str = "given by the caller") -> None:
        """Errors: those of :class:`pyengine.template.Template`."""
        self.source = source
        self.origin = origin
        self.bos = bos
        self.eos = eos
        self._template = Template(source)

    @classmethod
    def from_metadata(
        cls, metadata: Mapping[str, Any], tokenizer: Tokenizer, *, override: str | None = None, tools: bool = False
    ) -> ChatTemplate:
        """The template to use for a model.

        Args:
            metadata: GGUF keys and values; ``tokenizer.chat_template`` and ``tokenizer.chat_template.<name>`` count.
            tokenizer: the model's, for the texts of BOS and EOS.
            override: Jinja source (anything with ``{``), or the name of one of the file's templates or of
                :data:`BUILTIN_TEMPLATES`.
            tools: prefer the file's template for tool use.

        Raises:
            UnsupportedError: the file has no template and its vocabulary does not tell which is meant
                (code ``no_chat_template``), or the template cannot be used.
            InvalidArgument: ``override`` is an unknown name.
            FormatError: the template is no valid Jinja.
        """
        bos, eos = (("" if i is None else tokenizer.piece(i)) for i in (tokenizer.bos_id, tokenizer.eos_id))
        source, origin = _choose(metadata, tokenizer, override, tools)
        return cls(source, bos, eos, origin=origin)

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Any] | None = None,
        enable_thinking: bool = True,
        **variables: Any,
    ) -> str:
        """The prompt as text.

        Args:
            messages: the conversation, oldest first.
            add_generation_prompt: end with the opening of the assistant's turn.
            tools: descriptions of functions, for templates that know them.
            enable_thinking: for templates that can switch reasoning off; always passed (to one, absence means no).
            variables: anything else the template knows.

        Raises:
            UnsupportedError: the template raised an error, or went past its budget of steps or text.
        """
        known: dict[str, Any] = {"messages": messages, "tools": tools, "documents": None, **variables}
        size = _size(known)
        known |= {"add_generation_prompt": add_generation_prompt, "enable_thinking": enable_thinking}
        known = {"bos_token": self.bos, "eos_token": self.eos, **known}
        steps = _STEPS + _STEPS_PER_MESSAGE * len(messages) + _STEPS_PER_CHAR * size
        return self._template.render(known, steps=steps, chars=_CHARS + _CHARS_PER_CHAR * size)


@dataclass(frozen=True)
class PromptIds:
    """A prompt ready to be evaluated.

    Attributes:
        ids: token ids, with at most one BOS.
        text: what they say, markers included, for people.
        starts_in_reasoning: the prompt ends inside an opened ``<think>`` section.
    """

    ids: list[int]
    text: str
    starts_in_reasoning: bool


def build_prompt(
    template: ChatTemplate,
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    tools: Sequence[Any] | None = None,
    enable_thinking: bool = True,
    written: Mapping[str, Sequence[int]] | None = None,
    **variables: Any,
) -> PromptIds:
    """Messages to token ids; nothing that a message says becomes a control token.

    In the content of assistant messages the visible markers (``<think>``, ``<tool_call>``, ...) keep their meaning,
    because the model itself wrote them there and templates look for them; control tokens do not.

    Args:
        template, tokenizer: the model's.
        messages: each with a ``role`` (a plain name) and usually ``content``: text, None, or a list of
            ``{"type": "text", "text": ...}`` parts. Other keys are passed on.
        add_generation_prompt, tools, enable_thinking, variables: see :meth:`ChatTemplate.render`.
        written: token ids of texts between two markers, instead of those the tokenizer would make of them: see
            :func:`written_pieces`.

    Raises:
        InvalidArgument: a message is malformed, or its text is not valid Unicode.
        UnsupportedError: the template raised an error, or content is not text.
    """
    checked = [_checked(message, index) for index, message in enumerate(messages)]
    guard = _Guard(tokenizer, _unused_character([checked, tools, variables, template.source]))
    options = {"add_generation_prompt": add_generation_prompt, "enable_thinking": enable_thinking}
    given = {"tools": guard.everything(tools), **guard.everything(variables), **options}
    text = _render_calls(template, [guard.message(message) for message in checked], given)
    ids: list[int] = []
    for piece, token in tokenizer.split_special(text):
        if token is None:
            piece = guard.remove(piece)
            known = written.get(piece) if written else None
            ids += tokenizer.encode(piece, add_special=False) if known is None else known
        else:
            ids.append(token)
    starts_in_reasoning = text.rstrip().endswith(OPENER)
    return PromptIds(_with_one_bos(ids, tokenizer), guard.remove(text), starts_in_reasoning)


def written_pieces(tokenizer: Tokenizer, prompt: Sequence[int], answer: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Texts between two markers that a model wrote in other tokens than the tokenizer makes of them, with those tokens.

    A model may write "ab" as "a", "b". With these in :func:`build_prompt`, the next prompt repeats what was written
    rather than what could have been, and the keys of the session serve again. Control tokens are never in them.

    Args:
        tokenizer: the model's.
        prompt, answer: ids; the text that the prompt ends in may go on in the answer.
    """
    start = next((i + 1 for i in range(len(prompt) - 1, -1, -1) if tokenizer.is_marker(prompt[i])), 0)
    in_prompt = start < len(prompt)  # then the first of its tokens may bring a space that is no part of the text
    run: list[int] = []
    found: dict[str, tuple[int, ...]] = {}
    for token in (*prompt[start:], *answer, None):
        if token is not None and not tokenizer.is_marker(token):
            run.append(token)
            continue
        if run and not any(map(tokenizer.is_control, run)):
            with suppress(UnicodeDecodeError):  # an answer may end inside a character
                b"".join(map(tokenizer.token_bytes, run)).decode()
                text = tokenizer.decode(run, start=in_prompt)
                if tokenizer.encode(text, add_special=False) != run:
                    found[text] = tuple(run)
        run, in_prompt = [], False
    return found


def _render_calls(template: ChatTemplate, messages: list[dict[str, Any]], given: Mapping[str, Any]) -> str:
    """Renders messages whose tool calls are in the form this template takes.

    Some templates want the arguments as an object, some as JSON text; some show a call only where the content is None,
    some fail on that. Those that are given the wrong form fail, so the forms are tried, the one that a template could
    wrongly accept (empty content makes some drop the call) last.
    """
    if not any(message.get("tool_calls") for message in messages):
        return template.render(messages, **given)
    first: UnsupportedError | None = None
    for empty, as_text in ((None, False), (None, True), ("", False), ("", True)):
        try:
            return template.render([_with_calls(message, empty, as_text) for message in messages], **given)
        except UnsupportedError as error:
            if error.code not in ("template_error", "template_raised"):
                raise
            first = first or error
    assert first is not None
    raise first


def _with_calls(message: dict[str, Any], empty: str | None, as_text: bool) -> dict[str, Any]:
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        function = call.get("function") if isinstance(call, Mapping) else None
        if isinstance(function, Mapping) and "arguments" in function:
            call = {
                "type": "function",
                **call,
                "function": {**function, "arguments": _form(function["arguments"], as_text)},
            }
        calls.append(call)
    return {**message, "content": message["content"] or empty, "tool_calls": calls}


def _form(arguments: Any, as_text: bool) -> Any:
    if as_text:
        return arguments if isinstance(arguments, str) else to_json(arguments)
    if isinstance(arguments, str):
        try:
            return json.loads(arguments)
        except (ValueError, RecursionError):  # what the model wrote is not always JSON
            return arguments
    return arguments


def _with_one_bos(ids: list[int], tokenizer: Tokenizer) -> list[int]:
    """Templates and tokenizers both add BOS, or neither does."""
    bos = tokenizer.bos_id
    if bos is None:
        return ids
    start = 0
    while start < len(ids) and ids[start] == bos:
        start += 1
    return [bos, *ids[start:]] if start or tokenizer.add_bos else ids


class _Guard:
    """Breaks markers inside text by putting ``wall``, a character that occurs nowhere, into them."""

    def __init__(self, tokenizer: Tokenizer, wall: str) -> None:
        self._tokenizer = tokenizer
        self._wall = wall
        self._markers = tokenizer.special_strings
        self._first = {marker[0] for marker in self._markers}

    def remove(self, text: str) -> str:
        return text.replace(self._wall, "")

    def message(self, message: Message) -> dict[str, Any]:
        guarded = {key: value if key == "role" else self.everything(value) for key, value in message.items()}
        content = message.get("content")
        if message["role"] == "assistant" and isinstance(content, str):
            guarded["content"] = self.text(content, self._is_written_by_model)
        return guarded

    def _is_written_by_model(self, token: int) -> bool:
        return not self._tokenizer.is_control(token) or self._tokenizer.piece(token) in (OPENER, CLOSER)

    def everything(self, value: Any) -> Any:
        """All text inside, keys included."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, Mapping):
            return {self.text(str(key)): self.everything(item) for key, item in value.items()}
        if isinstance(value, Iterable) and not isinstance(value, (bytes, bytearray)):
            return [self.everything(item) for item in value]
        return value

    def text(self, text: str, keep: Callable[[int], bool] = lambda token: False) -> str:
        parts = []
        for piece, token in self._tokenizer.split_special(text):
            broken = token is not None and not keep(token)
            parts.append("".join(char + self._wall for char in piece) if broken else piece)
        # What only begins a marker at the end may be completed by what the template puts behind it.
        return "".join(parts) + (self._wall if self._ends_in_beginning(text) else "")

    def _ends_in_beginning(self, text: str) -> bool:
        tail = text[-64:]
        endings = [tail[i:] for i, char in enumerate(tail) if char in self._first]
        return any(marker.startswith(end) and marker != end for end in endings for marker in self._markers)


def _choose(metadata: Mapping[str, Any], tokenizer: Tokenizer, override: str | None, tools: bool) -> tuple[str, str]:
    """Source and origin."""
    main = "tokenizer.chat_template"
    stored = {key: metadata[key] for key in metadata if key.startswith(main + ".") and isinstance(metadata[key], str)}
    if override is not None:
        if "{" in override:
            return override, "given by the caller"
        if f"{main}.{override}" in stored:
            return stored[f"{main}.{override}"], f"the file's {main}.{override}"
        if override in BUILTIN_TEMPLATES:
            return BUILTIN_TEMPLATES[override], f"built in: {override}"
        names = [*BUILTIN_TEMPLATES, *(key.removeprefix(main + ".") for key in stored)]
        raise InvalidArgument(
            f"there is no chat template named {override!r}; known are {', '.join(names)}", code="bad_chat_template"
        )
    if tools and f"{main}.tool_use" in stored:
        return stored[f"{main}.tool_use"], f"the file's {main}.tool_use"
    for key in (main, f"{main}.default"):
        value = metadata.get(key)
        if isinstance(value, str) and value.strip():
            return value, f"the file's {key}"
    for name, markers in _TELLTALES.items():
        if all(tokenizer.token_id(marker) is not None for marker in markers):
            return BUILTIN_TEMPLATES[name], f"built in: {name}, chosen because the vocabulary has {' '.join(markers)}"
    raise UnsupportedError(
        "the file has no chat template, and its vocabulary does not tell which one it needs: continue plain text with "
        f"--raw, or give one with --chat-template FILE (or one of {', '.join(BUILTIN_TEMPLATES)})",
        code="no_chat_template",
        field=main,
    )


def check_messages(messages: Sequence[Message]) -> None:
    """Whether a prompt can be made of them. Errors: ``InvalidArgument``, ``UnsupportedError``, naming the message."""
    for index, message in enumerate(messages):
        _checked(message, index)
        for text in _texts(message):
            try:
                text.encode()
            except UnicodeEncodeError:
                raise InvalidArgument(f"message {index + 1} is not valid Unicode", code="invalid_text") from None


def _checked(message: Message, index: int) -> dict[str, Any]:
    def bad(problem: str) -> InvalidArgument:
        return InvalidArgument(f"message {index + 1} {problem}", code="bad_message")

    if not isinstance(message, Mapping):
        raise bad(f"is a {type(message).__name__}; expected a dict with role and content")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not _ROLE.fullmatch(role):
        raise bad(f"has the role {role!r}; expected a name such as user, assistant or system")
    if isinstance(content, Sequence) and not isinstance(content, (str, bytes)):
        for part in content:
            if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                raise UnsupportedError(f"message {index + 1} has content that is not text", code="bad_message")
        content = "\n".join(part["text"] for part in content)
    if content is not None and not isinstance(content, str):
        raise bad(f"has content of type {type(content).__name__}; expected text")
    return {**message, "content": content}


def _texts(value: Any) -> Iterable[str]:
    """All text inside, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from _texts(item)
    elif isinstance(value, Iterable) and not isinstance(value, (bytes, bytearray)):
        for item in value:
            yield from _texts(item)


def _size(value: Any) -> int:
    return sum(map(len, _texts(value)))


def _unused_character(value: Any) -> str:
    """A private-use character that occurs nowhere in ``value``."""
    used = {char for text in _texts(value) for char in set(text) if ord(char) >= 0xF0000}
    for code in range(0xF0000, 0xFFFFE):
        if chr(code) not in used:
            return chr(code)
    raise InvalidArgument("the messages use every private-use character there is", code="bad_message")
