"""GGUF files of Gemma 3: names, norms and config are those of transformers, the tokenizer that of SentencePiece."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType
from tokenizers import Tokenizer
from torch import Tensor

from kernels.weights.matrix import QuantizedMatrix
from models.config import parse_config
from models.conversion.convert import convert
from models.conversion.gguf import open_gguf
from models.conversion.piece_tokenizer import make_tokenizer
from models.files.json_values import ModelError
from tests.support.gguf_files import PIECES, write_gemma3_gguf

CONFIG: dict[str, Any] = {
    "model_type": "gemma3_text",
    "vocab_size": len(PIECES),
    "hidden_size": 96,
    "intermediate_size": 64,
    "num_hidden_layers": 7,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "sliding_window": 16,
    "rope_theta": 5000.0,
    "query_pre_attn_scalar": 32,
}
UP = "model.layers.3.mlp.up_proj.weight"
TOKENS = {piece.replace(" ", "▁"): token for token, (piece, _) in enumerate(PIECES)}


def oracle(**changes: Any) -> Any:
    """Return a model in float32 whose weights are numbers of bfloat16."""
    torch.manual_seed(0)
    model: Any = transformers.Gemma3ForCausalLM(transformers.Gemma3TextConfig(**CONFIG | changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):  # which are all zero
                parameter.copy_(torch.randint(-200, 200, parameter.shape) / 128)
            parameter.copy_(parameter.bfloat16())
    return model.eval()


def weights_of(model: Any) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}


def tokenizer_of(src: Path) -> Tokenizer:
    return Tokenizer.from_str(open_gguf(src).texts["tokenizer.json"])


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file without weights."""
    return write_gemma3_gguf(tmp_path_factory.mktemp("plain") / "model.gguf", CONFIG, {})


def test_weights(tmp_path: Path) -> None:
    """Norms lose the 1 that GGUF adds; rows stay in order; quantized matrices keep their values."""
    expected = weights_of(oracle())
    src = write_gemma3_gguf(tmp_path / "model.gguf", CONFIG, expected, types={UP: "Q5_0"})
    checkpoint = open_gguf(src)
    found = dict(checkpoint.weights)
    assert checkpoint.quantized
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        weight = found[name]
        if name == UP:
            assert isinstance(weight, QuantizedMatrix)
            blocks = gguf.quantize(tensor.numpy(), GGMLQuantizationType.Q5_0)
            values = torch.from_numpy(gguf.dequantize(blocks, GGMLQuantizationType.Q5_0))
            assert torch.equal(weight.dense(torch.float32), values)
        else:
            assert isinstance(weight, Tensor)
            assert torch.equal(weight, tensor), name


def test_the_model_is_that_of_transformers(tmp_path: Path) -> None:
    """With the types of the file that is fetched, some of whose blocks are drawn."""
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2}
    kinds = {"self_attn.q": "Q5_0", "self_attn.v": "Q8_0", "self_attn.o": "Q4_K", "mlp.down": "Q6_K"}
    types = {f"model.layers.1.{part}_proj.weight": kind for part, kind in kinds.items()}
    types["model.embed_tokens.weight"] = "Q8_0"
    config = CONFIG | sizes | {"num_attention_heads": 8}
    src = write_gemma3_gguf(tmp_path / "model.gguf", config, weights_of(oracle(**config)), types=types)
    found: dict[str, Tensor] = {}
    for name, weight in open_gguf(src).weights:
        assert isinstance(weight, QuantizedMatrix) == (name in types)
        found[name] = weight if isinstance(weight, Tensor) else weight.dense(torch.float32)
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=src.name, dtype=torch.float32)
    expected = weights_of(read)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_the_config_is_that_of_transformers(plain: Path) -> None:
    checkpoint = open_gguf(plain)
    assert not checkpoint.quantized
    assert checkpoint.config["rms_norm_eps"] == 1e-6
    assert checkpoint.config["eos_token_id"] == [1, TOKENS["<end_of_turn>"]]
    found = transformers.AutoConfig.for_model(**checkpoint.config).to_dict()
    expected = transformers.Gemma3TextConfig(**CONFIG, tie_word_embeddings=True).to_dict()
    for key in ("architectures", "eos_token_id"):
        del found[key], expected[key]
    assert {key: value for key, value in found.items() if expected.get(key, value) != value} == {}
    assert expected.keys() <= found.keys()
    assert found["layer_types"] == [*["sliding_attention"] * 5, "full_attention", "sliding_attention"]
    assert found["rope_parameters"]["sliding_attention"]["rope_theta"] == 10000.0
    assert found["rope_parameters"]["full_attention"]["rope_theta"] == 5000.0


def test_the_config_leaves_out_what_the_file_does(tmp_path: Path) -> None:
    src = write_gemma3_gguf(tmp_path / "model.gguf", CONFIG, {}, left_out=["gemma3.rope.freq_base"])
    config = open_gguf(src).config
    left_out = {"hidden_activation", "layer_types", "rope_theta", "rope_local_base_freq", "rope_scaling"}
    assert not left_out & config.keys()
    assert parse_config(config).rope.theta == transformers.Gemma3TextConfig.default_theta["global"]


def test_what_differs_between_sizes(tmp_path: Path) -> None:
    """Scaled positions, the base and the pattern of sliding layers, the scale of scores of 27B, an untied head."""
    scaled: dict[str, Any] = {"gemma3__rope__scaling__type": "linear", "gemma3__rope__scaling__factor": 8.0}
    src = write_gemma3_gguf(
        tmp_path / "model.gguf",
        CONFIG | {"num_hidden_layers": 62, "num_attention_heads": 4},
        {"lm_head.weight": torch.ones(2, 2)},
        gemma3__rope__freq_base_swa=7.0,
        gemma3__attention__sliding_window_pattern=4,
        **scaled,
    )
    config = open_gguf(src).config
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}
    assert config["rope_local_base_freq"] == 7.0
    assert parse_config(config).sliding_layers == tuple(layer for layer in range(62) if layer % 4 != 3)
    assert config["query_pre_attn_scalar"] == 24
    assert config["tie_word_embeddings"] is False


def test_texts(plain: Path) -> None:
    texts = open_gguf(plain).texts
    assert json.loads(texts["tokenizer_config.json"]) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 128,
        "chat_template": "{{ bos_token }}{{ messages[0].content }}",
    }
    assert json.loads(texts["generation_config.json"]) == {
        "bos_token_id": 2,
        "eos_token_id": [1, TOKENS["<end_of_turn>"]],
        "pad_token_id": 0,
    }


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("in the", ["in", "▁the"]),  # made of "▁" and "the", since "he" comes before "▁t"
        ("the thing", ["the", "▁", "th", "ing"]),
        ("a   in", ["a", "▁▁▁", "in"]),  # a run of spaces is a piece, which merges leave alone
        ("a      a", ["a", "▁▁▁", "▁▁▁", "a"]),
        ("\n\n\n", ["\n\n", "\n"]),
        ("[x]<b>in", ["[x]", "<b>", "in"]),  # although "[x" and "x]" are pieces
        ("[xx]", ["[x", "x]"]),
        ("é\t€", ["é", "<0x09>", "<0xE2>", "<0x82>", "<0xAC>"]),
        ("a<start_of_turn>in\n", ["a", "<start_of_turn>", "in", "\n"]),
    ],
)
def test_pieces(plain: Path, text: str, pieces: list[str]) -> None:
    tokenizer = tokenizer_of(plain)
    found = tokenizer.encode(text)
    assert found.tokens == ["<bos>", *pieces]
    assert found.ids == [TOKENS[piece] for piece in found.tokens]
    assert tokenizer.decode(found.ids, skip_special_tokens=False) == f"<bos>{text}"
    assert "start_of_turn" not in tokenizer.decode(found.ids)


def test_better_scores_are_merged_first() -> None:
    """Whatever the ids, and from the left."""
    pieces = ["<unk>", "ab", "bc", "a", "b", "c"]
    for scores, expected in (([0, -1, -2, 0, 0, 0], ["ab", "c"]), ([0, -2, -1, 0, 0, 0], ["a", "bc"])):
        tokenizer = make_tokenizer(pieces, scores, [2, 1, 1, 1, 1, 1], unknown=0, first=None)
        assert tokenizer.encode("abc").tokens == expected
    assert tokenizer.encode("bcbc?").tokens == ["bc", "bc", "<unk>"]


def test_control_pieces_make_no_merges() -> None:
    pieces = ["<unk>", "ab", "a", "b"]
    tokenizer = make_tokenizer(pieces, [0.0] * 4, [2, 5, 1, 1], unknown=0, first=None)
    assert tokenizer.encode("ab").tokens == ["a", "b"]


def test_what_is_no_tokenizer() -> None:
    with pytest.raises(ModelError, match="3 tokens with 2 scores and 3 types"):
        make_tokenizer(["a", "b", "c"], [0, 0], [1, 1, 1], unknown=0, first=None)
    with pytest.raises(ModelError, match="has token '▁▁' twice"):
        make_tokenizer(["a", "▁▁", "  "], [0, 0, 0], [1, 1, 4], unknown=0, first=None)


@pytest.mark.parametrize(
    ("extra", "match"),
    [
        ({"gemma3__attention__value_length": 8}, "values of 8 elements with keys of 32"),
        ({"gemma3__final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"gemma3__rope__scaling__type": "yarn"}, "rope scaling 'yarn'"),
        ({"gemma3__attention__sliding_window_pattern": "all"}, "sliding_window_pattern 'all'"),
        ({"tokenizer__ggml__model": "gpt2"}, "tokenizer is of kind 'gpt2'"),
        ({"tokenizer__ggml__add_space_prefix": True}, "begins texts with a space"),
        ({"tokenizer__ggml__add_eos_token": True}, "add_eos_token is not supported"),
        ({"tokenizer__ggml__bos_token_id": 2**32 - 1}, "bos_token_id 4294967295 is none of its 3"),
        ({"tokenizer__ggml__eos_token_id": len(PIECES)}, "eos_token_id"),
        ({"gemma3__block_count": "seven"}, r"ValueError\("),
        ({"general__architecture": 7}, "architecture 7 is not supported"),
        ({"left_out": ["gemma3.attention.sliding_window"]}, r"has no key gemma3\.attention\.sliding_window"),
        ({"left_out": ["tokenizer.ggml.tokens"]}, r"has no key tokenizer\.ggml\.tokens"),
        ({"left_out": ["tokenizer.ggml.unknown_token_id"]}, r"has no key tokenizer\.ggml\.unknown_token_id"),
    ],
)
def test_what_cannot_be_carried_over_is_refused(tmp_path: Path, extra: dict[str, Any], match: str) -> None:
    src = write_gemma3_gguf(tmp_path / "model.gguf", CONFIG, {}, **extra)
    with pytest.raises(ModelError, match=rf"model\.gguf: .*{match}"):
        open_gguf(src)


def test_unknown_and_padding_beyond_the_vocabulary_are_left_out(tmp_path: Path) -> None:
    none: dict[str, Any] = {f"tokenizer__ggml__{name}_token_id": 2**32 - 1 for name in ("unknown", "padding", "eot")}
    texts = open_gguf(write_gemma3_gguf(tmp_path / "model.gguf", CONFIG, {}, **none)).texts
    assert not {"unk_token", "pad_token"} & json.loads(texts["tokenizer_config.json"]).keys()
    assert "pad_token_id" not in json.loads(texts["generation_config.json"])
    assert Tokenizer.from_str(texts["tokenizer.json"]).encode("in the").tokens == ["<bos>", "in", "▁the"]


def _file(key: bytes, kind: int, value: bytes, times: int = 1) -> bytes:
    entry = len(key).to_bytes(8, "little") + key + kind.to_bytes(4, "little") + value
    return b"GGUF" + struct.pack("<IQQ", 3, 0, times) + entry * times


@pytest.mark.parametrize(
    "content",
    [
        _file(b"general.name", 4, b"\0" * 4, times=2),
        _file(b"a", 9, struct.pack("<IQ", 9, 1) * 3000 + struct.pack("<IQ", 4, 0)),
        _file(b"\xff\xfe", 4, b"\0" * 4),
        _file(b"general.architecture", 8, struct.pack("<Q", 2) + b"\xff\xfe"),
        _file(b"a", 99, b"\0" * 4),
    ],
    ids=["twice", "nested", "key", "text", "type"],
)
def test_broken_metadata(tmp_path: Path, content: bytes) -> None:
    src = tmp_path / "model.gguf"
    src.write_bytes(content)
    with pytest.raises(ModelError, match=r"model\.gguf: ") as error:
        open_gguf(src)
    assert len(str(error.value)) < 400


@torch.no_grad()
def test_transformers_reads_what_is_written(tmp_path: Path) -> None:
    """It computes what the file's model does."""
    model = oracle()
    src = write_gemma3_gguf(tmp_path / "model.gguf", CONFIG, weights_of(model))
    convert(src, tmp_path / "dst")
    read = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dst", dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "dst")
    tokens = torch.tensor([tokenizer("the thing in a  bbb\n" * 4)["input_ids"]])
    assert tokens[0, 0] == 2
    assert tokens.shape[1] > 2 * CONFIG["sliding_window"]
    torch.testing.assert_close(read(tokens).logits, model(tokens).logits, atol=1e-5, rtol=1e-5)
