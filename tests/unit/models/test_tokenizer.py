from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as Library
from tokenizers import decoders, models

from models.files.tokenizer_source import read_tokenizer_source
from models.tokenizer import IncrementalDecoder, Tokenizer, TokenizerError
from tests.support.profiles import examples
from tests.support.tiny import SPECIAL, TEMPLATE, write_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory)
    return Tokenizer(directory)


@pytest.fixture(scope="module")
def llama2(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Tokenizer with U+2581 for spaces and <0xNN> for other bytes."""
    directory = tmp_path_factory.mktemp("llama2")
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁Hello", "▁world", "!", "ab"]
    library = Library(models.BPE({word: id for id, word in enumerate(words)}, [], byte_fallback=True))
    library.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    library.add_special_tokens(["<s>", "</s>"])
    library.save(str(directory / "tokenizer.json"))
    return Tokenizer(directory)


def incremental(tokenizer: Tokenizer, ids: list[int], skip: bool = True) -> str:
    decoder = IncrementalDecoder(tokenizer, skip)
    return "".join(decoder.push(token) for token in ids) + decoder.flush()


@given(text=st.text())
@examples(30, 100)
def test_round_trip(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


@given(texts=st.lists(st.text(max_size=20), max_size=5), special=st.booleans())
@examples(30, 100)
def test_a_batch_is_its_texts(tokenizer: Tokenizer, texts: list[str], special: bool) -> None:
    alone = [tokenizer._tokenizer.encode(text, add_special_tokens=special).ids for text in texts]
    assert tokenizer.encode_batch(texts, special) == alone


def test_added_tokens_are_plain_text(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    library = Library.from_file(str(tmp_path / "tokenizer.json"))
    library.add_tokens(["<é>", "<日>"])
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path)
    for text in ("<é>", "<日>", "<|im_end|>"):
        (token,) = tokenizer.encode(text)
        assert tokenizer.token_bytes(token) == text.encode()


@given(ids=st.lists(st.integers(0, 330), max_size=60), skip=st.booleans())
@examples(30, 100)
def test_incremental_text_is_the_whole_text(tokenizer: Tokenizer, ids: list[int], skip: bool) -> None:
    assert incremental(tokenizer, ids, skip) == tokenizer.decode(ids, skip)


@given(raw=st.lists(st.sampled_from([*"aé日🙂".encode(), 0x80, 0xFF, 0xF0]), max_size=80))
@examples(30, 100)
def test_incremental_text_of_broken_characters(tokenizer: Tokenizer, raw: list[int]) -> None:
    """Single-byte tokens: characters that are incomplete, or bytes that start no character."""
    single = {tokenizer.token_bytes(token): token for token in range(320)}
    ids = [single[bytes([byte])] for byte in raw]
    assert incremental(tokenizer, ids) == bytes(raw).decode(errors="replace")


@given(text=st.text(max_size=30))
@examples(30, 100)
def test_characters_are_never_split(tokenizer: Tokenizer, text: str) -> None:
    decoder = IncrementalDecoder(tokenizer)
    pieces = [decoder.push(token) for token in tokenizer.encode(text) if token > 2]
    assert "\ufffd" not in "".join(pieces).replace("\ufffd", "", text.count("\ufffd"))


def test_a_character_comes_with_its_last_byte(tokenizer: Tokenizer) -> None:
    single = {tokenizer.token_bytes(token): token for token in range(320)}
    decoder = IncrementalDecoder(tokenizer)
    pieces = [decoder.push(single[bytes([byte])]) for byte in "é🙂".encode()]
    assert pieces == ["", "é", "", "", "", "🙂"]
    assert decoder.flush() == ""


def test_skipped_tokens_do_not_split_a_character(tokenizer: Tokenizer) -> None:
    single = {tokenizer.token_bytes(token): token for token in range(320)}
    first, second = (single[bytes([byte])] for byte in "é".encode())
    ids = [first, *[2] * 40, second]
    assert incremental(tokenizer, ids) == tokenizer.decode(ids) == "é"


@given(words=st.lists(st.sampled_from(["▁Hello", "▁world", "!", "ab", "<0x0A>", "</s>", "é", "日"]), max_size=40))
@examples(30, 100)
def test_incremental_text_with_byte_fallback(llama2: Tokenizer, words: list[str]) -> None:
    ids: list[int] = []
    for word in words:
        if len(word) == 1 and word not in "!":
            ids += [3 + byte for byte in word.encode()]
        else:
            ids.append(next(id for id in range(300) if llama2._tokenizer.id_to_token(id) == word))
    assert incremental(llama2, ids) == llama2.decode(ids)


def test_context_keeps_the_leading_space(llama2: Tokenizer) -> None:
    hello, world = 259, 260
    assert llama2.decode([world]) == "world"
    decoder = IncrementalDecoder(llama2, context=[1, hello])
    assert decoder.push(world) + decoder.flush() == " world"


def test_context_that_ends_inside_a_character_is_left_out(tokenizer: Tokenizer) -> None:
    single = {tokenizer.token_bytes(token): token for token in range(320)}
    decoder = IncrementalDecoder(tokenizer, context=[single[b"\xf0"]])
    assert decoder.push(single[b"a"]) + decoder.flush() == "a"


def test_work_per_token_is_bounded(tokenizer: Tokenizer) -> None:
    """Work per token is bounded, however many bytes in a row are not UTF-8."""
    broken = next(token for token in range(320) if tokenizer.token_bytes(token) == b"\x80")
    decoder = IncrementalDecoder(tokenizer)
    for _ in range(1000):
        decoder.push(broken)
        assert len(decoder._window) <= 16


@given(ids=st.lists(st.integers(0, 319), max_size=40))
@examples(30, 100)
def test_token_bytes_join_to_the_text(tokenizer: Tokenizer, ids: list[int]) -> None:
    raw = b"".join(map(tokenizer.token_bytes, ids))
    assert raw.decode(errors="replace") == tokenizer.decode(ids, skip_special_tokens=False)


def test_token_bytes_with_byte_fallback(llama2: Tokenizer) -> None:
    assert [llama2.token_bytes(token) for token in (1, 3 + 0xE2, 259, 999)] == [b"<s>", b"\xe2", b" Hello", b""]


def test_what_the_directory_says(tokenizer: Tokenizer, llama2: Tokenizer) -> None:
    assert (tokenizer.bos_token, tokenizer.bos_token_id) == (SPECIAL[1], 1)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == (SPECIAL[2], 2)
    assert tokenizer.chat_template == TEMPLATE
    assert tokenizer.vocab_size == 320
    assert (llama2.bos_token, llama2.bos_token_id, llama2.chat_template) == (None, None, None)


@pytest.mark.parametrize(
    ("config", "template"),
    [
        ({"chat_template": [{"name": "tool", "template": "T"}, {"name": "default", "template": "D"}]}, "D"),
        ({"chat_template": [{"name": "tool", "template": "T"}]}, None),
        ({"chat_template": {"default": "D", "tool_use": "T"}}, "D"),
        ({"chat_template": {"tool_use": "T"}}, None),
        ({"chat_template": [{"name": ["x"], "template": "X"}, {"name": "default", "template": "D"}, 3]}, "D"),
        ({"chat_template": None}, None),
    ],
)
def test_named_templates(tmp_path: Path, config: dict[str, object], template: str | None) -> None:
    write_tokenizer(tmp_path)
    config["eos_token"] = {"__type": "AddedToken", "content": "<|im_end|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.chat_template == template
    assert tokenizer.eos_token_id == 2
    (tmp_path / "chat_template.json").write_text('{"chat_template": "P"}')
    assert Tokenizer(tmp_path).chat_template == (template or "P")
    (tmp_path / "chat_template.json").unlink()
    (tmp_path / "additional_chat_templates").mkdir()
    for name, default in [("tool_use", None), ("default", "A default")]:
        (tmp_path / "additional_chat_templates" / f"{name}.jinja").write_text(f"A {name}")
        assert Tokenizer(tmp_path).chat_template == default == transformers_template(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("J")
    assert Tokenizer(tmp_path).chat_template == "A default" == transformers_template(tmp_path)
    (tmp_path / "additional_chat_templates" / "default.jinja").unlink()
    assert Tokenizer(tmp_path).chat_template == "J" == transformers_template(tmp_path)
    assert Tokenizer(tmp_path).tool_template == "A tool_use"


def transformers_template(directory: Path) -> str | None:
    found = transformers.PreTrainedTokenizerFast.from_pretrained(directory).chat_template
    return found.get("default") if isinstance(found, dict) else found


@pytest.mark.parametrize("name", ["chat_template.jinja", "additional_chat_templates/tool_use.jinja"])
def test_a_template_as_git_lfs_pointer(tmp_path: Path, name: str) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4665a5ea423c2713d436b5\n")
    with pytest.raises(TokenizerError, match=f"{name}: a git-lfs pointer, not a chat template; run `git lfs pull`"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", None),
        ("tokenizer.json", b"{"),
        ("tokenizer.json", b'{"model": 1}'),
        ("tokenizer.json", b"[]"),
        ("tokenizer.json", b"\xff\xfe"),
        ("tokenizer.json", b'{"model": {"type": "BPE", "vocab": {}, "merges": []}, "decoder": ["ByteLevel"]}'),
        ("tokenizer.json", b"[" * 10**5),
        ("tokenizer_config.json", b'{"a":' * 10**5),
        ("tokenizer_config.json", b"{"),
        ("special_tokens_map.json", b"["),
        ("chat_template.jinja", b"\xff\xfe"),
        ("tokenizer_config.json", b"[]"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, file: str, content: bytes | None) -> None:
    write_tokenizer(tmp_path)
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(TokenizerError, match=file):
        Tokenizer(tmp_path)


LISTED = {
    "320": {"content": "<x>", "special": True},
    "321": {"content": "<y>", "special": False, "normalized": False, "lstrip": True},
    "65": {"content": "a", "special": False},  # of the vocabulary, though not with this id
    "400": {"content": "<z>"},
    "x": {"content": "<w>"},
}


def test_tokens_that_only_tokenizer_config_lists(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"added_tokens_decoder": LISTED}))
    source = read_tokenizer_source(tmp_path)
    assert (source.added, source.left_out) == ((320, 321), ("a", "<z>"))
    tokenizer = Tokenizer(tmp_path)
    listed = {id: LISTED[id] for id in ("320", "321")}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"added_tokens_decoder": listed}))
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for text in ("a<x>b <y>", "the quick<y><x>", "<z>a"):
        assert tokenizer.encode(text) == theirs.encode(text)
    assert tokenizer.decode([67, 320, 321]) == theirs.decode([67, 320, 321], skip_special_tokens=True)
    assert (tokenizer.vocab_size, tokenizer.id_of("<x>"), tokenizer.id_of("<z>")) == (322, 320, None)
    assert "<x>" in tokenizer.special_names
