"""Text with marks: names of special tokens that contain one are plain text, and nothing else changes."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Library

from models.marked_text import MarkedText
from models.tokenizer import Tokenizer
from tests.support.profiles import examples
from tests.support.tiny import write_tokenizer

NAMES = ("<s>", "</s>", "<|im_end|>")
MARKS = {chr(0x100000 + i): char for i, char in enumerate("<|sa 日")}
MARK_OF = {char: mark for mark, char in MARKS.items()}
BOS = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])


def pieces(**parts: Any) -> Library:
    """Build a tokenizer with U+2581 for spaces and <0xNN> for bytes, like Llama 2's."""
    single = ["▁", *"ansd<>|/_im"]
    words = ["<unk>", *NAMES, *(f"<0x{byte:02X}>" for byte in range(256)), *single, "an", "▁a", "▁an", "s>"]
    merges = [("a", "n"), ("▁", "a"), ("▁", "an"), ("s", ">")]
    library = Library(models.BPE({word: id for id, word in enumerate(words)}, merges, byte_fallback=True))
    library.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    for name, part in parts.items():
        setattr(library, name, part)
    return library


def build(kind: str) -> Library:
    if kind == "bytes":
        with TemporaryDirectory() as directory:
            write_tokenizer(Path(directory))
            library = Library.from_file(f"{directory}/tokenizer.json")
        library.add_special_tokens(list(NAMES))
        library.add_tokens(["<a>"])
        return library
    if kind == "prepend":
        library = pieces(normalizer=normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]))
    elif kind == "spelt":  # the model itself joins "<", "s" and ">" to the special token
        library = Library(models.Unigram([("<unk>", 0.0), *((piece, -1.0) for piece in [*NAMES, *"ans<>/|_imd"])], 0))
        library.decoder = decoders.Fuse()
    elif kind == "unknown":
        library = Library(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "an": 3}, unk_token="<unk>"))
        library.pre_tokenizer = pre_tokenizers.Whitespace()
    else:
        scheme: Any = "first" if kind == "first" else "always"
        library = pieces(pre_tokenizer=pre_tokenizers.Metaspace("▁", scheme))
    flags: dict[str, Any] = {"strips": {"lstrip": True, "rstrip": True}, "normalized": {"normalized": True}}.get(
        kind, {}
    )
    library.add_special_tokens([AddedToken(name, **{"normalized": False, **flags}) for name in ("<unk>", *NAMES)])
    library.post_processor = BOS
    return library


@cache
def tokenizer(kind: str) -> Tokenizer:
    with TemporaryDirectory() as directory:
        build(kind).save(f"{directory}/tokenizer.json")
        return Tokenizer(directory)


KINDS = ["bytes", "prepend", "first", "always", "strips", "normalized", "unknown", "spelt"]
TEXTS = st.lists(st.sampled_from([*NAMES, "<", "|", "s", "an ", " a", "a", " ", "\n", "日", "🙂", "<a>"])).map("".join)


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXTS, special=st.booleans(), data=st.data())
@examples(20, 100)
def test_marks_change_nothing_outside_names(kind: str, text: str, special: bool, data: st.DataObject) -> None:
    """Marks that stand for characters outside the names of special tokens change no id."""
    tokens = tokenizer(kind)
    marked = text
    for name in ("a", "s", "日", " "):
        if data.draw(st.booleans()):
            marked = "".join(
                part if part in NAMES else part.replace(name, MARK_OF[name]) for part in split_at_names(marked)
            )
    assert tokens.encode_marked(MarkedText(marked, MARKS), special) == tokens.encode(text, special)


def split_at_names(text: str) -> list[str]:
    """Split into names and what is between them."""
    return re.split("(" + "|".join(map(re.escape, NAMES)) + ")", text)


@pytest.mark.parametrize("kind", KINDS)
@given(text=TEXTS)
@examples(20, 100)
def test_a_marked_name_is_no_special_token(kind: str, text: str) -> None:
    tokens = tokenizer(kind)
    parts = split_at_names(text)
    marked = "</s>".join(part.replace("<", MARK_OF["<"]) for part in ["an", "".join(parts), "an"])
    ids = tokens.encode_marked(MarkedText(marked, MARKS), False)
    special = [id for id in ids if id in tokens._special_names and tokens._special_names[id] != "<unk>"]
    assert special == tokens.encode("</s>", False) * 2
    if kind in ("bytes", "spelt"):
        text = text if kind == "bytes" else "".join(char for char in text if char in "ans<>/|_imd")
        ids = [id for id in ids if id or kind == "bytes"]
        assert tokens.decode(ids, skip_special_tokens=False) == f"an</s>{text}</s>an"
