"""LoRA adapters: the file is that of the checkpoint merged in numpy; what is not W + s B A is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import save_file

from pyengine.errors import EngineError
from pyengine_convert.cli import main
from pyengine_convert.convert import Options, convert
from tests.convert.checkpoints import Tensors, config, save, weights, write_json
from tests.convert.readback import Readback
from tests.support import needs_data

pytestmark = needs_data

R = 4
LINEAR = {"self_attn.q_proj": (128, 64), "self_attn.v_proj": (64, 64), "mlp.down_proj": (64, 96)}  # module: (out, in)


def factors(seed: int = 1, rank: int = R, modules: dict[str, tuple[int, int]] = LINEAR) -> Tensors:
    rng = np.random.default_rng(seed)
    out: Tensors = {}
    for module, (rows, cols) in modules.items():
        for i in range(2):
            name = f"base_model.model.model.layers.{i}.{module}"
            out[f"{name}.lora_A.weight"] = rng.standard_normal((rank, cols)).astype(np.float32)
            out[f"{name}.lora_B.weight"] = rng.standard_normal((rows, rank)).astype(np.float32)
    return out


def adapter(folder: Path, tensors: Tensors | None = None, **settings: Any) -> Path:
    """As PEFT's save_pretrained leaves it."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {"peft_type": "LORA", "r": R, "lora_alpha": 6, "fan_in_fan_out": False, "bias": "none"}
    values |= {"target_modules": ["q_proj"], "init_lora_weights": True, "use_dora": False, "rank_pattern": {}}
    write_json(folder / "adapter_config.json", {k: v for k, v in (values | settings).items() if v is not None})
    save_file(factors() if tensors is None else tensors, folder / "adapter_model.safetensors")
    return folder


def merged(base: Tensors, tensors: Tensors, scale: float | Callable[[str], float]) -> Tensors:
    """The definition, in double precision."""
    out = dict(base)
    for name, a in tensors.items():
        if not name.endswith("lora_A.weight"):
            continue
        module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        b = tensors[name.replace("lora_A", "lora_B")]
        s = scale(module) if callable(scale) else scale
        change = s * (b.astype(np.float64) @ a.astype(np.float64))
        out[f"{module}.weight"] = (base[f"{module}.weight"].astype(np.float64) + change).astype(np.float32)
    return out


def values_of(tmp_path: Path, tensors: Tensors, folders: list[Path], **changes: Any) -> dict[str, npt.NDArray[Any]]:
    source = save(tmp_path / "m", config(**changes), tensors)
    convert(source, tmp_path / "m.gguf", "f32", force=True, threads=2, options=Options(lora=folders))
    return Readback(tmp_path / "m.gguf").values


def assert_equal_files(found: dict[str, npt.NDArray[Any]], tmp_path: Path, tensors: Tensors, **changes: Any) -> None:
    """``found`` holds what a conversion of these tensors without any adapter holds, but for rounding."""
    source = save(tmp_path / "expected", config(**changes), tensors)
    convert(source, tmp_path / "expected.gguf", "f32", force=True)
    expected = Readback(tmp_path / "expected.gguf").values
    assert set(found) == set(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=2e-6, atol=2e-5, err_msg=name)


@pytest.mark.parametrize("arch", ["LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"])
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_a_merged_file_is_that_of_the_merged_checkpoint(tmp_path: Path, arch: str, dtype: str) -> None:
    base = weights(config(arch), dtype=dtype)
    found = values_of(tmp_path, base, [adapter(tmp_path / "a")], architectures=[arch])
    wide = {name: value.astype(np.float32) for name, value in base.items()}
    assert_equal_files(found, tmp_path, merged(wide, factors(), 6 / R), architectures=[arch])


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({"use_rslora": True}, 6 / np.sqrt(R)),
        ({"lora_alpha": 0.5}, 0.5 / R),
        ({"fan_in_fan_out": True}, 6 / R),  # of linear layers PEFT ignores it
        (
            {"alpha_pattern": {"down_proj": 1, r"layers\.1\.self_attn\.q_proj": 20}},
            lambda m: (1 if "down" in m else 20 if "1.self_attn.q" in m else 6) / R,
        ),
        ({"use_rslora": True, "alpha_pattern": {"v_proj": 2}}, lambda m: (2 if "v_proj" in m else 6) / np.sqrt(R)),
    ],
)
def test_the_scale_is_what_the_configuration_means(tmp_path: Path, settings: Any, scale: Any) -> None:
    base = weights(config())
    found = values_of(tmp_path, base, [adapter(tmp_path / "a", **settings)])
    assert_equal_files(found, tmp_path, merged(base, factors(), scale))


def test_modules_may_have_ranks_of_their_own(tmp_path: Path) -> None:
    tensors = factors() | factors(2, 7, {"mlp.up_proj": (96, 64)})
    folder = adapter(tmp_path / "a", tensors, rank_pattern={"up_proj": 7})
    found = values_of(tmp_path, weights(config()), [folder])
    expected = merged(weights(config()), tensors, lambda m: 6 / (7 if "up_proj" in m else R))
    assert_equal_files(found, tmp_path, expected)


def test_adapters_are_added_to_one_another(tmp_path: Path) -> None:
    base, second = weights(config()), factors(5, modules={"self_attn.q_proj": (128, 64), "mlp.gate_proj": (96, 64)})
    folders = [adapter(tmp_path / "a"), adapter(tmp_path / "b", second, lora_alpha=2)]
    found = values_of(tmp_path, base, folders)
    assert_equal_files(found, tmp_path, merged(merged(base, factors(), 6 / R), second, 2 / R))


def test_the_embedding_has_its_factors_the_other_way_round(tmp_path: Path) -> None:
    rng, base = np.random.default_rng(3), weights(config())
    a, b = rng.standard_normal((R, 300)).astype(np.float32), rng.standard_normal((64, R)).astype(np.float32)
    name = "base_model.model.model.embed_tokens.lora_embedding_"
    found = values_of(tmp_path, base, [adapter(tmp_path / "a", {name + "A": a, name + "B": b})])
    base["model.embed_tokens.weight"] += (6 / R * (b @ a).T).astype(np.float32)
    assert_equal_files(found, tmp_path, base)


def test_matrices_and_biases_trained_as_a_whole_replace_the_checkpoints(tmp_path: Path) -> None:
    base = weights(config("Qwen2ForCausalLM"))
    whole = {
        "base_model.model.lm_head.weight": np.full((300, 64), 0.25, np.float32),
        "base_model.model.model.layers.0.self_attn.q_proj.base_layer.bias": np.arange(128, dtype=np.float32),
    }
    folder = adapter(tmp_path / "a", factors() | whole, bias="lora_only", modules_to_save=["lm_head"])
    found = values_of(tmp_path, base, [folder], architectures=["Qwen2ForCausalLM"])
    base["lm_head.weight"] = whole["base_model.model.lm_head.weight"]
    base["model.layers.0.self_attn.q_proj.bias"] = np.arange(128, dtype=np.float32)
    assert_equal_files(found, tmp_path, merged(base, factors(), 6 / R), architectures=["Qwen2ForCausalLM"])


def change(**settings: Any) -> Callable[[Path], object]:
    return lambda folder: adapter(folder, **settings)


def replaced(**tensors: Any) -> Callable[[Path], object]:
    """Factors with some others (None: without) of layer 0's q_proj."""

    def make(folder: Path) -> Path:
        all_of = factors() | {f"base_model.model.model.layers.0.self_attn.q_proj.{k}": v for k, v in tensors.items()}
        return adapter(folder, {k: v for k, v in all_of.items() if v is not None})

    return make


def other(name: str, *shape: int) -> Callable[[Path], object]:
    return lambda folder: adapter(folder, factors() | {name: np.ones(shape, np.float32)})


def without(name: str) -> Callable[[Path], object]:
    return lambda folder: (adapter(folder) / name).unlink()


def pickled(folder: Path) -> None:
    (adapter(folder) / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def not_finite(folder: Path) -> None:
    tensors = factors()
    tensors["base_model.model.model.layers.1.mlp.down_proj.lora_B.weight"][3, 0] = np.inf
    adapter(folder, tensors)


ONE = np.ones((R, 65), np.float32)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: folder.mkdir(), ["no adapter_config.json", "PEFT"]),
        (without("adapter_model.safetensors"), ["no adapter_model.safetensors"]),
        (pickled, ["adapter_model.bin is not read"]),
        (lambda folder: (adapter(folder) / "adapter_config.json").write_text("{"), ["not valid JSON"]),
        (change(peft_type="LOHA"), ["peft_type", "LOHA", "LORA"]),
        (change(peft_type=None), ["peft_type", "missing"]),
        (change(use_dora=True), ["use_dora", "True"]),
        (change(lora_bias=True), ["lora_bias"]),
        (change(init_lora_weights="pissa_niter_4"), ["init_lora_weights", "pissa_niter_4"]),
        (change(layer_replication=[[0, 1], [0, 1]]), ["layer_replication"]),
        (change(trainable_token_indices=[3]), ["trainable_token_indices"]),
        (change(r="4"), ["r is", '"4"', "integer"]),
        (change(r=8), ["lora_A", "has shape [4, ", "expected [8, "]),
        (change(lora_alpha=None), ["lora_alpha", "missing"]),
        (change(rank_pattern={"(": 3}), ["rank_pattern", "regular expression"]),
        (replaced(**{"lora_B.weight": None}), ["layers.0.self_attn.q_proj", "no lora_B"]),
        (replaced(**{"lora_A.weight": ONE}), ["lora_A", "[4, 65]", "[4, 64]"]),
        (replaced(**{"lora_B.weight": np.ones((128, R), np.float64)}), ["F64", "BF16"]),
        (replaced(lora_magnitude_vector=ONE[0]), ["lora_magnitude_vector", "neither"]),
        (other("base_model.model.model.layers.2.mlp.up_proj.lora_A.weight", R, 64), ["layers.2", "another model"]),
        (other("base_model.model.model.norm.lora_A.weight", R, 64), ["model.norm"]),
        (other("base_model.model.lm_head.weight", 301, 64), ["lm_head", "[301, 64]", "[300, 64]"]),
        (lambda folder: adapter(folder, {"x": np.ones(1, np.float32)}), ["x, which is neither"]),
        (not_finite, ["blk.1.ffn_down.weight[3, 0]", "damaged"]),
    ],
)
def test_other_adapters_are_refused_by_name(tmp_path: Path, make: Callable[[Path], object], words: list[str]) -> None:
    save(tmp_path / "m", config())
    make(tmp_path / "a")
    with pytest.raises(EngineError) as error:
        convert(tmp_path / "m", tmp_path / "m.gguf", "q8_0", options=Options(lora=[tmp_path / "a"]))
    for word in words:
        assert word in str(error.value)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "m"]


def test_a_tied_head_cannot_change_without_the_embedding(tmp_path: Path) -> None:
    values = config(tie_word_embeddings=True)
    tensors = weights(values)
    folder = adapter(
        tmp_path / "a",
        {
            "base_model.model.model.embed_tokens.lora_embedding_A": np.ones((R, 300), np.float32),
            "base_model.model.model.embed_tokens.lora_embedding_B": np.ones((64, R), np.float32),
        },
    )
    with pytest.raises(EngineError, match=r"model\.embed_tokens\.weight, which the configuration ties"):
        values_of(tmp_path, tensors, [folder], tie_word_embeddings=True)


def test_the_command_merges_and_says_so_and_refuses_it_for_gguf_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, folder, out = save(tmp_path / "m", config()), adapter(tmp_path / "style"), tmp_path / "m.gguf"
    assert main([str(source), "-o", str(out), "--type", "f16", "--lora", str(folder), "--table"]) == 0
    printed = capsys.readouterr().err
    assert "note: style: merged into 6 matrices" in printed
    assert (
        next(line for line in printed.splitlines() if line.startswith("blk.0.attn_q.weight")).split()[4] == "F32+LoRA"
    )
    assert main([str(out), "-o", str(tmp_path / "n.gguf"), "--lora", str(folder)]) == 2
    assert "--lora is for checkpoints" in capsys.readouterr().err
    assert main([str(source), "-o", str(tmp_path / "n.gguf"), "--lora", str(tmp_path / "gone")]) == 1
    assert "gone has no adapter_config.json" in capsys.readouterr().err


def test_what_is_resumed_has_the_same_adapter(tmp_path: Path) -> None:
    source, folder = save(tmp_path / "m", config()), adapter(tmp_path / "a")

    def stop(_size: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "m.gguf", "f16", resume=True, progress=stop, options=Options(lora=[folder]))
    settings = json.loads((folder / "adapter_config.json").read_text())
    write_json(folder / "adapter_config.json", settings | {"lora_alpha": 1234})
    with pytest.raises(EngineError, match="other options"):
        convert(source, tmp_path / "m.gguf", "f16", resume=True, options=Options(lora=[folder]))
