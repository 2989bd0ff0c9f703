"""What the fuzzers of the Python half start from: valid inputs, small."""
# ruff: noqa: E501

from __future__ import annotations

import dataclasses
import json
import random
import struct
from collections.abc import Callable
from typing import Any

from pyengine import chat_file
from pyengine.chat import BUILTIN_TEMPLATES
from pyengine.json_fields import settings_to_json
from pyengine.sampling import SamplerSettings

MESSAGES = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "one <think> two"},
    {
        "role": "assistant",
        "content": "<think>\nhm\n</think>\n\nthree",
        "tool_calls": [{"name": "f", "arguments": {"a": [1, 2.5, None]}}],
    },
    {"role": "user", "content": "four"},
]

TEMPLATES = [
    *BUILTIN_TEMPLATES.values(),
    "{%- set ns = namespace(a=1, b='') %}{%- for m in messages[::-1] %}{%- if loop.first and m.role != 'x' %}{%- set ns.a = loop.index0 %}"
    "{%- break %}{%- endif %}{%- endfor %}{{ ns.a ~ ns.b }}",
    "{% macro f(x, y=2) -%}{{ x|tojson(indent=2) }}{{ y|default('z', true) }}{%- endmacro %}{{ f(messages, y=3) }}{{ f(tools[0]) }}",
    "{{ messages|map(attribute='role')|join(', ')|upper }}{{ messages|selectattr('role', 'equalto', 'user')|list|length }}",
    "{{ 'a b'.split(' ')[-1].strip()|trim }}{{ ('x' * 3)|indent(2, true) }}{{ 7 // 2 + 3 % 2 - -1 * 2 ** 3 }}{{ 1.5|int }}",
    "{% if a is defined and not b %}{% elif messages is iterable %}{{ messages[0]['content'][1:3] }}{% else %}x{% endif %}",
    "{% for k, v in tools[0].items() %}{{ k }}={{ v }}{% else %}none{% endfor %}{{ raise_exception('no') }}",
    "{% set x %}captured{% endset %}{% filter upper %}{{ x }}{% endfilter %}{% call(u) f() %}{{ u }}{% endcall %}",
    "{% generation %}{{ messages|last }}{% endgeneration %}{{ strftime_now('%d %b %Y') }}{{ range(3)|list|sort(reverse=true)|unique|list }}",
    "{% with a = 1, b = [1, (2, 3), {'c': 4}] %}{{ b[2].c in b and a < 2 <= 3 }}{% endwith %}{% do messages %}{# note #}{% raw %}{{{% endraw %}",
]

CHECKPOINT_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4,
    "intermediate_size": 4,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 16,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "vocab_size": 4,
    "hidden_act": "silu",
}

_SHAPES = {
    "model.embed_tokens.weight": (4, 4),
    "model.norm.weight": (4,),
    "lm_head.weight": (4, 4),
    "model.layers.0.input_layernorm.weight": (4,),
    "model.layers.0.post_attention_layernorm.weight": (4,),
    "model.layers.0.self_attn.q_proj.weight": (4, 4),
    "model.layers.0.self_attn.k_proj.weight": (2, 4),
    "model.layers.0.self_attn.v_proj.weight": (2, 4),
    "model.layers.0.self_attn.o_proj.weight": (4, 4),
    "model.layers.0.mlp.gate_proj.weight": (4, 4),
    "model.layers.0.mlp.up_proj.weight": (4, 4),
    "model.layers.0.mlp.down_proj.weight": (4, 4),
}


def checkpoint(dtype: str = "F16") -> bytes:
    item = {"F32": 4, "F16": 2, "BF16": 2}[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, shape in _SHAPES.items():
        size = item
        for n in shape:
            size *= n
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    return struct.pack("<Q", len(text)) + text + bytes(at)


CHECKPOINT = checkpoint()


def chat() -> bytes:
    header = {
        "written_by": "pyengine",
        "model": {field.name: "x" for field in dataclasses.fields(chat_file.ModelIdentity)},
        "template": {"source": BUILTIN_TEMPLATES["chatml"], "bos": "", "eos": "", "origin": "given"},
        "settings": settings_to_json(SamplerSettings()),
        "max_tokens": 100,
        "stop": ["x"],
        "think_budget": None,
        "system": "be brief",
        "messages": MESSAGES,
        "dropped": 1,
        "written": {"three": [1, 2]},
        "keys": None,
    }
    return chat_file._encode(header)


SEEDS: dict[str, Callable[[], list[bytes]]] = {
    "template": lambda: [text.encode() for text in TEMPLATES],
    "safetensors": lambda: [checkpoint(dtype) for dtype in ("F16", "F32", "BF16")],
    "chat": lambda: [chat()],
    "tokenizer": lambda: [random.Random(i).randbytes(300) for i in range(20)],
}
