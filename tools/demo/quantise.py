"""Requantises a GGUF file: every matrix whose rows hold whole blocks takes `--type`, the rest becomes F32.

pyengine's quantisers do the work; the `gguf` package writes the file. Meant for small models: all of it is in memory.

    python tools/demo/quantise.py demo-F32.gguf demo-Q4_K.gguf --type q4_k
"""

from __future__ import annotations

import argparse
from pathlib import Path

from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType

from pyengine import GgufFile, quant
from pyengine.errors import UnsupportedError

OWN_KEYS = ("general.architecture", "general.file_type")  # the writer's constructor and this script set these


def file_type(name: str) -> LlamaFileType:
    """What `general.file_type` says of a file whose matrices are all of one type; K-quants are "small" then."""
    kinds = LlamaFileType.__members__
    return next(kinds[key] for key in (f"MOSTLY_{name}", f"MOSTLY_{name}_S", f"ALL_{name}") if key in kinds)


def copy_metadata(source: Path, writer: GGUFWriter) -> None:
    """All of it, with its exact types; "GGUF.*" are the reader's names for the header."""
    for key, field in GGUFReader(source).fields.items():
        if key.startswith("GGUF.") or key in OWN_KEYS:
            continue
        kind = field.types[0]
        item = field.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(key, field.contents(), kind, item)


def requantise(source: Path, target: Path, type_name: str) -> dict[str, int]:
    """Writes `target`; returns how many tensors it holds of each type."""
    wanted = quant.find(type_name)
    if not wanted.can_quantise:
        raise UnsupportedError(f"pyengine cannot quantise to {wanted.name}", code="cannot_quantise")
    counts: dict[str, int] = {}
    with GgufFile.open(source) as file:
        writer = GGUFWriter(target, file.metadata["general.architecture"])
        copy_metadata(source, writer)
        writer.add_file_type(file_type(wanted.name))
        for name, tensor in file.tensors.items():
            values = file.dequantise(name)  # [rows, cols]
            fits = len(tensor.dims) == 2 and tensor.cols % wanted.block_size == 0
            if fits:
                packed = quant.quantise(wanted.name, values)
                writer.add_tensor(name, packed, raw_dtype=GGMLQuantizationType(wanted.type))
            else:
                writer.add_tensor(name, values.reshape(tensor.dims[::-1]))
            kind = wanted.name if fits else "F32"
            counts[kind] = counts.get(kind, 0) + 1
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="F32, F16 or BF16; from anything else the losses add up")
    parser.add_argument("target", type=Path)
    parser.add_argument("--type", required=True, help="a type pyengine can quantise to, such as q4_k")
    args = parser.parse_args()
    if args.target.exists():
        parser.error(f"{args.target} exists")
    counts = requantise(args.source, args.target, args.type)
    print(f"{args.target}: " + ", ".join(f"{n} tensors {kind}" for kind, n in counts.items()))


if __name__ == "__main__":
    main()
