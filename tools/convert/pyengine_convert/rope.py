"""Rope scaling of a ``config.json`` -> GGUF keys, or a tensor of factors.

Two spellings exist: ``rope_theta`` with ``rope_scaling`` (transformers 4), and ``rope_parameters`` holding everything
(transformers 5).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pyengine.errors import UnsupportedError
from pyengine_convert.keyvalues import KeyValues
from pyengine_convert.source import Config

DEFAULT_THETA = 10000.0  # what transformers takes for llama, qwen2 and qwen3 when the key is absent


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of a model.

    Attributes:
        theta: base of the frequencies.
        kind: "default", "dynamic", "linear", "yarn" or "llama3". Dynamic NTK scaling acts beyond the model's context
        only. scaling: the rest of the configuration.
    """

    theta: float
    kind: str
    scaling: Config

    def write(self, arch: str, keys: KeyValues) -> None:
        """Adds the ``{arch}.rope.*`` keys. llama3 scaling has none: its factors are a tensor."""
        keys.f32(f"{arch}.rope.freq_base", self.theta)
        if self.kind == "linear":
            keys.string(f"{arch}.rope.scaling.type", "linear")
            keys.f32(f"{arch}.rope.scaling.factor", self.scaling.number("factor"))
        elif self.kind == "yarn":
            self._write_yarn(arch, keys)

    def _write_yarn(self, arch: str, keys: KeyValues) -> None:
        keys.string(f"{arch}.rope.scaling.type", "yarn")
        keys.f32(f"{arch}.rope.scaling.factor", self.scaling.number("factor"))
        keys.u32(
            f"{arch}.rope.scaling.original_context_length", self.scaling.integer("original_max_position_embeddings")
        )
        attn_factor = self._attn_factor()
        if attn_factor is not None:
            keys.f32(f"{arch}.rope.scaling.attn_factor", attn_factor)
        for beta in ("beta_fast", "beta_slow"):
            if self.scaling.get(beta) is not None:
                keys.f32(f"{arch}.rope.scaling.yarn_{beta}", self.scaling.number(beta))

    def _attn_factor(self) -> float | None:
        """The factor by which readers multiply 0.1 ln(factor) + 1 to get the attention scale; None for 1.

        Three spellings: ``attention_factor`` is the scale itself; ``mscale`` / ``mscale_all_dim`` give it as a ratio;
        ``attn_factor`` is already the factor (transformers does not know this key: docs/convert.md).
        """
        factor = self.scaling.number("factor")
        usual = _mscale(factor, 1.0)
        if self.scaling.get("attention_factor") is not None:
            return self.scaling.number("attention_factor") / usual
        if self.scaling.get("attn_factor") is not None:
            return self.scaling.number("attn_factor")
        if self.scaling.get("mscale") and self.scaling.get("mscale_all_dim"):
            scale = _mscale(factor, self.scaling.number("mscale"))
            return scale / _mscale(factor, self.scaling.number("mscale_all_dim")) / usual
        return None

    def factors(self, head_dim: int) -> npt.NDArray[np.float32] | None:
        """llama3 scaling as divisors of the frequencies, float32 [head_dim / 2]; None for other kinds.

        Wavelengths below original / high_freq_factor stay, above original / low_freq_factor are stretched by
        ``factor``, between them the frequency is interpolated.
        """
        if self.kind != "llama3":
            return None
        factor = self.scaling.number("factor")
        low, high = self.scaling.number("low_freq_factor"), self.scaling.number("high_freq_factor")
        original = self.scaling.integer("original_max_position_embeddings")
        if high <= low:
            raise self.scaling.bad("high_freq_factor", high, f"a number above low_freq_factor, {low:g}")
        wavelength = 2 * math.pi * self.theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
        smooth = np.clip((original / wavelength - low) / (high - low), 0.0, 1.0)
        return (1.0 / ((1.0 - smooth) / factor + smooth)).astype(np.float32)


def _mscale(factor: float, weight: float) -> float:
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1.0 else 1.0


def read_rope(config: Config) -> Rope:
    """Errors: ``FormatError``; ``UnsupportedError`` for kinds of scaling that GGUF readers cannot express."""
    parameters = config.section("rope_parameters")
    scaling = parameters if parameters.values else config.section("rope_scaling")
    theta = parameters.number("rope_theta", config.get("rope_theta", DEFAULT_THETA))
    kind = scaling.string("rope_type", scaling.get("type", "default"))
    if kind not in {"default", "dynamic", "linear", "yarn", "llama3"}:
        raise UnsupportedError(
            f"{scaling.where}: rope scaling {kind!r} is not supported; expected default, linear, dynamic, yarn "
            "or llama3",
            code="unsupported_rope",
            field="rope_type",
        )
    for where in (config, scaling):
        if where.number("partial_rotary_factor", 1.0) != 1.0:
            raise UnsupportedError(f"{where.where}: partial_rotary_factor other than 1", code="unsupported_rope")
    if kind == "yarn" and not scaling.boolean("truncate", True):
        raise UnsupportedError(f"{scaling.where}: YaRN with truncate false", code="unsupported_rope", field="truncate")
    return Rope(theta, kind, scaling)
