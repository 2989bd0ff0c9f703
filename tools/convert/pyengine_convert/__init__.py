"""Hugging Face checkpoints to GGUF: ``pyengine-convert SRC -o OUT.gguf --type q8_0``.

The steps, one module each, every one usable by itself:

    checkpoint     a folder of safetensors -> tensors that can be read a few rows at a time
    architectures  the tables: which tensors a model has, their shapes, their GGUF names and keys
    rope           rope scaling -> keys, or a tensor of factors
    vocabulary     tokenizer files -> tokens, types, merges, special ids (with pretokenizer, sentencepiece_model)
    recipe         which type each tensor gets
    writer         planned tensors -> a verified file under its final name, or nothing
"""
