"""Tokenizer of SentencePiece's pieces and scores (BPE with byte fallback), as a tokenizer.json has it."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from models.files.json_values import ModelError, short

SPACE = "\u2581"
"""Character for a space in pieces."""


class PieceKind(IntEnum):
    """Kinds of pieces, by their numbers in SentencePiece and GGUF."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def make_tokenizer(
    pieces: Sequence[str], scores: Sequence[float], kinds: Sequence[int], *, unknown: int | None, first: int | None
) -> Tokenizer:
    """Make the tokenizer whose token i is pieces[i].

    scores: of two pieces that a text could be merged into next, the one with the higher score is. kinds: a PieceKind
    each. unknown: the token for what has no piece, not even one per byte; None: that is left out. first: a token that
    texts begin with; None: none. A space in a user-defined piece is one in the text, as GGUF has it. Raises ModelError.

    User-defined pieces are cut out of a text before it is merged, the longest first, as SentencePiece does it; so they
    are added tokens that are matched in the normalized text, and no merges make or take them.
    """
    if not len(pieces) == len(scores) == len(kinds):
        raise ModelError(f"has {len(pieces)} tokens with {len(scores)} scores and {len(kinds)} types")
    names = [
        piece.replace(" ", SPACE) if kind == PieceKind.USER_DEFINED else piece
        for piece, kind in zip(pieces, kinds, strict=True)
    ]
    vocab = {name: token for token, name in enumerate(names)}
    if len(vocab) < len(names):
        twice = next(name for token, name in enumerate(names) if vocab[name] != token)
        raise ModelError(f"has token {short(twice)} twice")
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=merges_of(vocab, scores, kinds),
            unk_token=None if unknown is None else names[unknown],
            fuse_unk=True,
            byte_fallback=PieceKind.BYTE in kinds,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    if first is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{names[first]} $A",
            pair=f"{names[first]} $A {names[first]}:1 $B:1",
            special_tokens=[(names[first], first)],
        )
    special = {token for token, kind in enumerate(kinds) if kind in (PieceKind.UNKNOWN, PieceKind.CONTROL)}
    tokenizer.add_tokens(
        [
            AddedToken(name, normalized=token not in special, special=token in special)
            for token, name in enumerate(names)
            if token in special or kinds[token] == PieceKind.USER_DEFINED
        ]
    )
    return tokenizer


def merges_of(vocab: dict[str, int], scores: Sequence[float], kinds: Sequence[int]) -> list[tuple[str, str]]:
    """List the pairs of pieces that make a piece, in the order in which they are merged: by the score of what they
    make, and for one piece by the pair's tokens.

    vocab: the token of each piece. SentencePiece merges neighbours in the order of scores alone; where two overlapping
    pairs make the same piece, it takes the left one, which a list of pairs cannot say.
    """
    parts = {piece: token for piece, token in vocab.items() if kinds[token] == PieceKind.NORMAL}
    made = sorted(parts, key=lambda piece: (-scores[parts[piece]], parts[piece]))
    merges = []
    for piece in made:
        cuts = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        pairs = [(left, right) for left, right in cuts if left in parts and right in parts]
        merges += sorted(pairs, key=lambda pair: (parts[pair[0]], parts[pair[1]]))
    return merges
