"""pyengine: a CPU inference engine for GGUF models.

>>> import pyengine
>>> model = pyengine.Model.open(pyengine.demo_model_path())
>>> session = model.session(n_ctx=512)
>>> logits = session.eval(model.tokenizer.encode("What is 2 + 3?"))
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from pyengine import _core
from pyengine.errors import (
    Cancelled,
    ContextFull,
    CpuError,
    EngineError,
    FileError,
    FormatError,
    InternalError,
    InvalidArgument,
    NumericError,
    OutOfMemory,
    UnsupportedError,
)
from pyengine.gguf_file import GgufFile, TensorInfo, guard_mapped_files
from pyengine.model import Model, Session

if TYPE_CHECKING:
    from pyengine.generate import Chat, End, Reasoning, Text
    from pyengine.planner import plan
    from pyengine.sampling import Sampler, SamplerSettings
    from pyengine.tokenizer import Tokenizer

__version__: str = _core.version()

# Importing these costs time that a program which only wants logits need not spend. The function generate() is not among
# them: its module has the same name (from pyengine.generate import generate).
_LAZY = {
    "Chat": "generate",
    "End": "generate",
    "Reasoning": "generate",
    "Text": "generate",
    "Sampler": "sampling",
    "SamplerSettings": "sampling",
    "Tokenizer": "tokenizer",
    "plan": "planner",
}

__all__ = [
    "Cancelled",
    "Chat",
    "ContextFull",
    "CpuError",
    "End",
    "EngineError",
    "FileError",
    "FormatError",
    "GgufFile",
    "InternalError",
    "InvalidArgument",
    "Model",
    "NumericError",
    "OutOfMemory",
    "Reasoning",
    "Sampler",
    "SamplerSettings",
    "Session",
    "TensorInfo",
    "Text",
    "Tokenizer",
    "UnsupportedError",
    "__version__",
    "demo_model_path",
    "guard_mapped_files",
    "numerics_epoch",
    "plan",
]


def __getattr__(name: str) -> object:
    if name in _LAZY:
        return getattr(import_module(f"pyengine.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'pyengine' has no attribute {name!r}")


def demo_model_path() -> Path:
    """The GGUF file of the demo model that comes with the package."""
    return Path(__file__).parent / "data" / "demo-q8_0.gguf"


def numerics_epoch() -> int:
    """Logits can change between releases only when this number does."""
    return _core.numerics_epoch()
