"""Hugging Face checkpoints and GGUF files to GGUF: ``pyengine-convert SRC -o OUT.gguf --type q4_k_m``.

The steps, one module each, every one usable by itself:

    checkpoint     a folder of safetensors -> tensors that can be read a few rows at a time
    architectures  the tables: which tensors a model has, their shapes, their GGUF names and keys
    rope           rope scaling -> keys, or a tensor of factors
    vocabulary     tokenizer files -> tokens, types, merges, special ids (with pretokenizer, sentencepiece_model)
    gguf_source    or a GGUF file as the source
    imatrix        importance matrices
    recipe         which type each tensor gets
    encode         rows -> bytes of a type, and what was lost
    journal        what an unfinished file holds, for --resume
    inspect        what a GGUF file holds, printed
    writer         planned tensors -> a verified file under its final name, or nothing
"""
