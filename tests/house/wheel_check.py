"""Installs the newest wheel of a folder into a new environment outside the checkout and answers with the demo model.

Also looks at what the native libraries are linked with: no OpenMP, no libpython in libpyengine.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

PROGRAM = """
import pyengine
from pyengine.capi import ffi, lib, library_path
assert ffi.string(lib.pe_version()).decode() == pyengine.__version__
with pyengine.Model.open(pyengine.demo_model_path()) as model, model.session(n_ctx=64, threads=2) as session:
    logits = session.eval(model.tokenizer.encode("2 + 3"))
    assert logits.shape == (model.n_vocab,)
print(library_path())
"""


def main(folder: str) -> None:
    wheel = max(Path(folder).resolve().glob("pyengine-*.whl"), key=lambda p: p.stat().st_mtime)
    with tempfile.TemporaryDirectory() as tmp:
        subprocess.run([sys.executable, "-m", "venv", tmp + "/venv"], check=True)
        python = tmp + "/venv/bin/python"
        subprocess.run([python, "-m", "pip", "install", "-q", f"{wheel}[convert]"], check=True)
        library = subprocess.run([python, "-c", PROGRAM], check=True, capture_output=True, text=True, cwd=tmp)
        print("imports and evaluates:", wheel.name)
        if shutil.which("ldd"):
            lib = library.stdout.strip()
            linked = subprocess.run(["ldd", lib], check=True, capture_output=True, text=True).stdout
            for banned in ("gomp", "libomp", "libiomp", "libpython", "blas"):
                assert banned not in linked, f"{lib} is linked with {banned}:\n{linked}"
            print(linked.rstrip())
        answer = subprocess.run(
            [tmp + "/venv/bin/pyengine-run", "--demo", "--temp", "0", "What is 12 + 30?"],
            check=True,
            capture_output=True,
            text=True,
            cwd=tmp,
        )
        print("pyengine-run --demo:", answer.stdout.strip())
        assert "42" in answer.stdout, answer.stdout
        editor = "from pyengine.cli import line_editor; line_editor._Editor(lambda text: (), None)"
        subprocess.run([python, "-c", editor], check=True, cwd=tmp, env=os.environ | {"TERM": "xterm"})
        for command in ("pyengine-convert", "pyengine-imatrix", "pyengine-perplexity"):
            subprocess.run([f"{tmp}/venv/bin/{command}", "--help"], check=True, capture_output=True, cwd=tmp)


if __name__ == "__main__":
    main(sys.argv[1])
