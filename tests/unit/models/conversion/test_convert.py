"""Conversion to the served format: its output, its errors, and no partial output after a failure."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from models.config import ModelError, parse_config
from models.conversion.convert import convert
from models.decoder import DecoderModel
from models.loader import load_model
from parallel.group import Group
from parallel.matrix_layer import Placement
from tests.support.gguf_files import MERGES, TOKENS, write_gguf

CPU = torch.device("cpu")
Weights = dict[str, Tensor]
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "torch_dtype": "float32",
    "_name_or_path": "somewhere/private",
}


def random_weights(config: dict[str, Any], dtype: torch.dtype = torch.float32) -> Weights:
    model = DecoderModel(parse_config(config), Placement(Group.single(), torch.float32, torch.device("meta")))
    generator = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {slot.source: slot.full_shape for slot in model.weight_slots()}
    shapes |= {slot.source: slot.full_shape for slot in model.matrix_slots()}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def write_checkpoint(directory: Path, config: dict[str, Any], weights: Weights) -> Path:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    save_file(weights, directory / "model.safetensors")
    vocab = {token: number for number, token in enumerate(TOKENS)}
    tokenizer = {"version": "1.0", "model": {"type": "BPE", "vocab": vocab, "merges": MERGES}}
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    (directory / "tokenizer_config.json").write_text('{"eos_token": "</s>"}', encoding="utf-8")
    (directory / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    (directory / "README.md").write_text("no part of a model", encoding="utf-8")
    return directory


def stored(directory: Path) -> Weights:
    found: Weights = {}
    for path in directory.glob("*.safetensors"):
        found |= load_file(path)
    return found


def assert_equal(found: Weights, expected: Weights) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, expected[name].to(torch.bfloat16)), name


@pytest.fixture
def src(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "src", CONFIG, random_weights(CONFIG))


@pytest.fixture
def dst(tmp_path: Path) -> Iterator[Path]:
    """Destination of the conversion; after the test no partial output may remain next to it."""
    yield tmp_path / "dst"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_files(src: Path, dst: Path) -> None:
    convert(src, dst)
    expected = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in dst.iterdir()} == expected | {"chat_template.jinja"}
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (dst / name).read_bytes() == (src / name).read_bytes()


def test_config(src: Path, dst: Path) -> None:
    convert(src, dst)
    config = json.loads((dst / "config.json").read_text(encoding="utf-8"))
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert "_name_or_path" not in config
    assert (config["rope_theta"], config["rope_scaling"]) == (5000.0, None)
    assert parse_config(config) == parse_config(CONFIG)


def test_scaled_rope_is_kept_in_both_spellings(tmp_path: Path, dst: Path) -> None:
    rope = {"rope_type": "linear", "rope_theta": 7.0, "factor": 4.0}
    config = CONFIG | {"rope_parameters": rope}
    convert(write_checkpoint(tmp_path / "src", config, random_weights(config)), dst)
    served = json.loads((dst / "config.json").read_text(encoding="utf-8"))
    assert served["rope_parameters"] == rope
    older = {key: value for key, value in served.items() if key != "rope_parameters"}
    assert parse_config(older).rope == parse_config(config).rope


@pytest.mark.parametrize("null", [{}, {"rope_theta": None}])
def test_a_rope_without_theta_gets_the_default(tmp_path: Path, dst: Path, null: dict[str, Any]) -> None:
    config = CONFIG | {"rope_parameters": {"rope_type": "default", **null}, **null}
    convert(write_checkpoint(tmp_path / "src", config, random_weights(config)), dst)
    served = json.loads((dst / "config.json").read_text(encoding="utf-8"))
    assert served["rope_theta"] == 10000.0
    assert parse_config(served).rope == parse_config(config).rope


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_weights_are_rounded_to_bfloat16(tmp_path: Path, dst: Path, dtype: torch.dtype) -> None:
    weights = random_weights(CONFIG, dtype)
    convert(write_checkpoint(tmp_path / "src", CONFIG, weights), dst)
    assert_equal(stored(dst), weights)
    load_model(dst, dtype=torch.bfloat16, device=CPU, group=Group.single(), progress=False)


def test_tied_embeddings_are_stored_once(tmp_path: Path, dst: Path) -> None:
    weights = random_weights(CONFIG)
    twins = weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}
    convert(write_checkpoint(tmp_path / "src", CONFIG, twins), dst)
    assert_equal(stored(dst), weights)


def test_untied_head_is_kept(tmp_path: Path, dst: Path) -> None:
    config = CONFIG | {"tie_word_embeddings": False}
    weights = random_weights(config)
    assert "lm_head.weight" in weights
    convert(write_checkpoint(tmp_path / "src", config, weights), dst)
    assert_equal(stored(dst), weights)


def test_sharded_source_and_result(src: Path, tmp_path: Path, dst: Path) -> None:
    weights = random_weights(CONFIG)
    limit = 3 * max(tensor.nbytes // 2 for tensor in weights.values())
    convert(src, dst, shard_bytes=limit)
    files = sorted(dst.glob("*.safetensors"))
    assert len(files) > 2
    assert [path.name for path in files] == [
        f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)
    ]
    index = json.loads((dst / "model.safetensors.index.json").read_text(encoding="utf-8"))
    total = 0
    for path in files:
        with safe_open(str(path), framework="pt") as file:
            names = list(file.keys())
            size = sum(file.get_tensor(name).nbytes for name in names)
        assert size <= limit
        assert all(index["weight_map"][name] == path.name for name in names)
        total += size
    assert index["metadata"]["total_size"] == total
    assert_equal(stored(dst), weights)
    load_model(dst, dtype=torch.bfloat16, device=CPU, group=Group.single(), progress=False)

    again = tmp_path / "again"
    convert(dst, again)
    assert {path.name for path in again.glob("model*")} == {"model.safetensors"}
    assert_equal(stored(again), weights)


def refused(src: Path, dst: Path, match: str, *, force: bool = False) -> None:
    with pytest.raises(ModelError, match=match):
        convert(src, dst, force=force)


def test_pickled_weights_are_refused(src: Path, dst: Path) -> None:
    (src / "model.safetensors").rename(src / "pytorch_model.bin")
    refused(src, dst, r"pytorch_model\.bin.*run code")
    assert not dst.exists()


@pytest.mark.parametrize("name", ["model.bin", "model.pt", "model.safetensors", "notes.txt"])
def test_unknown_files_are_refused(tmp_path: Path, dst: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04.")
    refused(tmp_path / name, dst, "neither a .gguf file nor a directory")
    refused(tmp_path / "absent", dst, "no such file")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_incomplete_sources_are_refused(src: Path, dst: Path, name: str) -> None:
    (src / name).unlink()
    refused(src, dst, "has no")
    if name == "config.json":
        (src / "weights.gguf").touch()
        refused(src, dst, r"weights\.gguf, name that file")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"model_type": "gpt2"}, "model_type"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"num_hidden_layers": 3}, "9 tensors are missing.*model.layers.2"),
        ({"num_hidden_layers": 1}, "unexpected tensor model.layers.1"),
        ({"intermediate_size": 25}, "has shape"),
        ({"max_position_embeddings": 10**30}, "max_position_embeddings 1"),
    ],
)
def test_contradicting_configs_are_refused(src: Path, dst: Path, change: dict[str, Any], match: str) -> None:
    (src / "config.json").write_text(json.dumps(CONFIG | change), encoding="utf-8")
    refused(src, dst, match)
    assert not dst.exists()


def test_unfit_tensors_are_refused(tmp_path: Path, dst: Path) -> None:
    weights = random_weights(CONFIG)
    norm = "model.norm.weight"
    quantized = weights | {norm: weights[norm].to(torch.int8)}
    refused(write_checkpoint(tmp_path / "int8", CONFIG, quantized), dst, "unquantized")


def test_broken_files_are_refused(src: Path, dst: Path) -> None:
    (src / "model.safetensors").write_bytes(b"\xff" * 64)
    refused(src, dst, "not a readable safetensors file")
    index = src / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"model.norm.weight": "../src/model.safetensors"}}', encoding="utf-8")
    refused(src, dst, "is not a file of this directory")
    (src / "config.json").write_text("[]", encoding="utf-8")
    refused(src, dst, "expected a JSON object")


def test_destination_is_never_overwritten_unasked(src: Path, dst: Path) -> None:
    dst.mkdir()
    convert(src, dst)  # an empty directory may be overwritten
    (dst / "mine").touch()
    refused(src, dst, "--force")
    assert (dst / "mine").exists()
    convert(src, dst, force=True)
    assert not (dst / "mine").exists()
    assert_equal(stored(dst), random_weights(CONFIG))


def test_destination_survives_a_failure(src: Path, dst: Path) -> None:
    convert(src, dst)
    (src / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": 3}), encoding="utf-8")
    refused(src, dst, "missing", force=True)
    assert_equal(stored(dst), random_weights(CONFIG))


def test_destinations_that_cannot_be(src: Path, tmp_path: Path) -> None:
    refused(src, src, "holds the source", force=True)
    refused(src, tmp_path, "holds the source", force=True)
    refused(src, src / "config.json", "is not a directory", force=True)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    refused(src, tmp_path / "link", "is not a directory")
    refused(src, src / "config.json" / "below", "cannot be written")


class TestGGUF:
    weights = random_weights(CONFIG | {"vocab_size": len(TOKENS)})

    def test_everything_arrives(self, tmp_path: Path, dst: Path) -> None:
        convert(write_gguf(tmp_path / "model.gguf", CONFIG, self.weights), dst)
        assert_equal(stored(dst), self.weights)
        served = json.loads((dst / "config.json").read_text(encoding="utf-8"))
        assert "quantization_config" not in served
        expected = CONFIG | {"vocab_size": len(TOKENS), "eos_token_id": 2, "head_dim": 4}
        assert parse_config(served) == parse_config(expected)
        load_model(dst, dtype=torch.float32, device=CPU, group=Group.single(), progress=False)

        assert json.loads((dst / "tokenizer_config.json").read_text(encoding="utf-8")) == {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<s>",
            "eos_token": "</s>",
            "unk_token": "<unk>",
            "clean_up_tokenization_spaces": False,
            "model_max_length": 64,
            "chat_template": "{{ messages[0].content }}",
        }
        generation = json.loads((dst / "generation_config.json").read_text(encoding="utf-8"))
        assert generation == {"bos_token_id": 1, "eos_token_id": 2}

        tokenizer = Tokenizer.from_file(str(dst / "tokenizer.json"))
        text = "abcab  12\na"
        # Digits are split off first, so the two spaces before one stay together.
        assert tokenizer.encode(text).tokens == ["abc", "ab", "ĠĠ", "1", "2", "Ċ", "a"]
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
        assert tokenizer.encode("a</s>").ids[-1] == 2
        assert tokenizer.get_vocab_size() == len(TOKENS)
        assert tokenizer.decode([2]) == ""

    @pytest.mark.parametrize(
        ("extra", "match"),
        [
            ({"architecture": "falcon"}, "architecture 'falcon'"),
            ({"pre": "unheard-of"}, "unknown kind 'unheard-of'"),
            ({"llama__expert_count": 8}, "mixture of experts"),
            ({"llama__rope__scaling__type": "yarn"}, "RoPE was scaled"),
        ],
    )
    def test_what_cannot_be_carried_over_is_refused(
        self, tmp_path: Path, dst: Path, extra: dict[str, Any], match: str
    ) -> None:
        refused(write_gguf(tmp_path / "model.gguf", CONFIG, {}, **extra), dst, match)
        assert not dst.exists()

    def test_scaled_frequencies_are_refused(self, tmp_path: Path, dst: Path) -> None:
        refused(
            write_gguf(tmp_path / "model.gguf", CONFIG, {"rope_freqs.weight": torch.ones(2)}), dst, "RoPE was scaled"
        )

    def test_broken_file(self, tmp_path: Path, dst: Path) -> None:
        path = tmp_path / "model.gguf"
        for content in (b"", b"GGUF", b"no GGUF file at all" * 10):
            path.write_bytes(content)
            refused(path, dst, "not a readable GGUF file")

    def test_missing_package(self, tmp_path: Path, dst: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("models.conversion.gguf.importlib.util.find_spec", lambda name: None)
        (tmp_path / "model.gguf").touch()
        refused(tmp_path / "model.gguf", dst, r"needs transformers: pip install 'magicdec\[convert\]'")


def test_sources_are_left_alone(src: Path, dst: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in src.iterdir()}
    convert(src, dst)
    shutil.rmtree(dst)
    assert {path.name: path.read_bytes() for path in src.iterdir()} == before
