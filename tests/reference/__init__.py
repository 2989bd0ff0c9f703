"""Oracles for the model tests that share no code with the engine.

`configs` lists small decoder configurations, `weights` makes their weights from a seed, `decoder` runs them in numpy
float64, `gguf_writer` writes them as GGUF files, and `hf_logits.npz` holds what Hugging Face computed for them in
float32 (made by `make_hf_logits`, the only module here that needs torch).
"""
