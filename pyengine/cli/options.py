"""The command-line options that choose tokens, and how they become :class:`SamplerSettings`."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Mapping
from typing import Any, NoReturn

from pyengine.cli.common import UsageError, check_utf8
from pyengine.errors import InvalidArgument
from pyengine.sampling import SAMPLERS, SamplerSettings

# flags, setting, type, help
_OPTIONS: tuple[tuple[tuple[str, ...], str, type, str], ...] = (
    (("--temp", "--temperature"), "temperature", float, "temperature; 0 always takes the most likely token"),
    (("--top-k",), "top_k", int, "keep the k most likely tokens; 0: all"),
    (("--top-p",), "top_p", float, "keep the most likely tokens up to probability p; 1: all"),
    (("--min-p",), "min_p", float, "keep tokens at least p times as likely as the best; 0: all"),
    (("--typical", "--typical-p"), "typical_p", float, "locally typical sampling up to probability p; 1: off"),
    (("--top-nsigma", "--top-n-sigma"), "top_n_sigma", float, "keep logits within n standard deviations; -1: off"),
    (("--xtc-probability",), "xtc_probability", float, "chance of removing the top choices; 0: off"),
    (("--xtc-threshold",), "xtc_threshold", float, "what counts as a top choice; above 0.5: off"),
    (("--repeat-last-n",), "repeat_last_n", int, "tokens the penalties look back; 0: off, -1: all"),
    (("--repeat-penalty",), "repeat_penalty", float, "penalty for tokens seen; 1: off"),
    (("--presence-penalty",), "presence_penalty", float, "subtracted from the logits of tokens seen; 0: off"),
    (("--frequency-penalty",), "frequency_penalty", float, "subtracted once per occurrence; 0: off"),
    (("--dry-multiplier",), "dry_multiplier", float, "penalty on continuing a repeated sequence; 0: off"),
    (("--dry-base",), "dry_base", float, "growth of that penalty with the length of the repeat"),
    (("--dry-allowed-length",), "dry_allowed_length", int, "the longest repeat without penalty"),
    (("--dry-penalty-last-n",), "dry_penalty_last_n", int, "tokens searched for repeats; 0: off, -1: all"),
)
_FLAG_OF = {setting: flags[0] for flags, setting, _, _ in _OPTIONS} | {
    "seed": "--seed",
    "samplers": "--samplers",
    "logit_bias": "--logit-bias",
    "top_logprobs": "--top-logprobs",
    "dry_sequence_breakers": "--dry-sequence-breaker",
}
SETTINGS = tuple(flag.removeprefix("--") for setting, flag in _FLAG_OF.items() if setting != "top_logprobs")
"""Names of the settings that a conversation can change with :func:`changed`."""


def add_sampler_options(parser: argparse.ArgumentParser) -> None:
    """Adds them; an option that is not given leaves the model's recommendation, else the default, in place."""
    group = parser.add_argument_group("choosing tokens (defaults: what the model recommends, else those shown)")
    defaults = SamplerSettings()
    group.add_argument("-s", "--seed", type=int, metavar="N", help="draws the same text again (default -1: random)")
    for flags, setting, kind, text in _OPTIONS:
        text = f"{text} (default {getattr(defaults, setting):g})"
        group.add_argument(*flags, dest=setting, type=kind, metavar="N" if kind is int else "X", help=text)
    group.add_argument(
        "--dry-sequence-breaker",
        dest="dry_sequence_breakers",
        action="append",
        metavar="TEXT",
        help=r'no repeat reaches across this; may be given several times, "none" clears (default: newline : " *)',
    )
    group.add_argument(
        "--logit-bias",
        action="append",
        metavar="ID+X",
        help="add X to the logit of a token id, as in 42+1.5, 42-1.5 or 42-inf; may be given several times",
    )
    group.add_argument("--samplers", metavar="LIST", help=f"the chain (default {';'.join(SAMPLERS)})")
    group.add_argument("--top-logprobs", type=int, metavar="N", help="with --json: report log-probabilities")


def sampler_settings(args: argparse.Namespace, recommended: Mapping[str, Any]) -> SamplerSettings:
    """The settings: the user's, else the model's, else the defaults. Errors: ``UsageError`` naming the option."""
    given = {setting: getattr(args, setting) for _, setting, _, _ in _OPTIONS if getattr(args, setting) is not None}
    if args.seed is not None and args.seed != -1:
        given["seed"] = args.seed
    if args.top_logprobs is not None:
        given["top_logprobs"] = args.top_logprobs
    if args.samplers is not None:
        given["samplers"] = tuple(name.strip() for name in re.split("[;,]", args.samplers) if name.strip())
    if args.logit_bias:
        given["logit_bias"] = dict(map(_logit_bias, args.logit_bias))
    if args.dry_sequence_breakers:
        breakers = [check_utf8(text, "--dry-sequence-breaker") for text in args.dry_sequence_breakers]
        given["dry_sequence_breakers"] = tuple(text for text in breakers if text != "none")
    try:
        user = SamplerSettings(**given)
    except InvalidArgument as error:
        raise UsageError(f"{_FLAG_OF.get(error.field, error.field)}: {error.message}") from None
    return dataclasses.replace(user, **{k: v for k, v in recommended.items() if k not in given})


def _logit_bias(text: str) -> tuple[int, float]:
    match = re.fullmatch(r"(\d{1,9})[:=]?([+-]?(?:inf|\d+\.?\d*|\.\d+))", text)
    if match is None or (match[2][0] not in "+-" and not re.match(r"\d+[:=]", text)):
        raise UsageError(f"--logit-bias: {text!r} is not of the form ID+X, such as 42+1.5 or 42-inf")
    return int(match[1]), float(match[2])


class _Strict(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def changed(settings: SamplerSettings, name: str, value: str) -> SamplerSettings:
    """``settings`` with one of them set as its option would. Errors: ``UsageError`` naming the option."""
    parser = _Strict(add_help=False, allow_abbrev=False)
    add_sampler_options(parser)
    args = parser.parse_args([f"--{name}={value}"])
    kept = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)}
    if name == "seed":
        del kept["seed"]  # -1 stands for no seed
    return sampler_settings(args, kept)


def described(settings: SamplerSettings) -> list[str]:
    """Every setting as its option names it: ``temp 0.6``."""
    lines = []
    for setting, flag in _FLAG_OF.items():
        value = getattr(settings, setting)
        if setting == "samplers":
            text = ";".join(value)
        elif setting == "dry_sequence_breakers":
            text = " ".join(map(repr, value)) or "none"
        elif setting == "logit_bias":
            text = " ".join(f"{token}{bias:+g}" for token, bias in value.items()) or "none"
        else:
            text = "random" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
        if setting != "top_logprobs":
            lines.append(f"{flag.removeprefix('--')} {text}")
    return lines
