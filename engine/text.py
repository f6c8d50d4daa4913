"""Incremental conversion of output tokens to text, cut at the first stop string. Free of torch."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from engine.messages import FINISH_STOP, RequestOutput, TokenLogprobs
from engine.params import SamplingParams
from models.tokenizer import IncrementalDecoder, Tokenizer


@dataclass(frozen=True, slots=True)
class TextChunk:
    """Text that one round's tokens added."""

    text: str
    offsets: list[int]
    """Offset in the output's text at which each token's own text begins, for the tokens that belong to the output
    (fewer than were pushed only if `stopped`). Held-back text counts, so the offset of a token of a removed stop string
    may lie beyond the end of the text."""
    stopped: str | None = None
    """The stop string that ended the output."""

    @property
    def tokens_used(self) -> int:
        return len(self.offsets)


@dataclass(frozen=True, slots=True)
class Delta:
    """Part of a request's output that one round added. The last one carries finish_reason."""

    text: str
    tokens: list[int]
    offsets: list[int]
    """Offset in the output's text at which each token's own text begins."""
    logprobs: list[TokenLogprobs] | None
    """One entry per token, if the request asks for them."""
    drafted: int
    accepted: int
    finish_reason: str | None
    stop_reason: int | str | None
    """The stop string or stop token that ended the output; None for the model's own end of text."""


class StopString:
    """A stop string, prepared once to be searched for in any number of texts (Knuth, Morris, Pratt)."""

    def __init__(self, text: str) -> None:
        self.text = text
        # border[i]: length of the longest proper prefix of text[:i] that is also its suffix.
        self._border = [0, 0]
        for char in text[1:]:
            self._border.append(self._advance_match(self._border[-1], char))

    def feed(self, matched: int, char: str) -> tuple[int, bool]:
        """Advance a match by one character.

        matched: length of the longest proper prefix of the stop string that a text ends with. Returns this length for
        the text followed by `char`, and whether that text ends with the whole stop string.
        """
        matched = self._advance_match(matched, char)
        return (matched, False) if matched < len(self.text) else (self._border[matched], True)

    def _advance_match(self, matched: int, char: str) -> int:
        while matched and self.text[matched] != char:
            matched = self._border[matched]
        return matched + 1 if self.text[matched] == char else 0


class Seen(NamedTuple):
    """Text that stop strings match: a range of the stream's text, in characters. `text` may be longer than the range:
    then it begins with characters that the stream's text does not have, such as an empty line between messages."""

    text: str
    begin: int
    end: int


class StopScope(Protocol):
    """Finds the part of a growing text that stop strings match.

    decided: number of characters of the text for which it is known whether they match.
    """

    @property
    def decided(self) -> int: ...

    def feed(self, text: str, token: int, offset: int) -> list[Seen]:
        """Return what is certain after a token, which adds `text`. offset: at which the token's own text begins; it may
        come later."""

    def finish(self, text: str) -> list[Seen]:
        """Return the rest, after text that is the last one."""


def stop_strings(params: SamplingParams) -> list[StopString]:
    return [StopString(stop) for stop in params.stop if stop]


class TextStream:
    """Text of one request. The chunks join to the same text, however the tokens were split into rounds.

    Text that may be the beginning of a stop string is held back until that is decided. A stop string counts only if the
    token that completes it is the `min_tokens`-th or a later one. Stop strings match all of the text, or what a
    StopScope finds in it; the text is cut where the match begins.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        params: SamplingParams,
        context: Sequence[int] = (),
        stops: Sequence[StopString] | None = None,
        shown: frozenset[int] = frozenset(),
        scope: StopScope | None = None,
    ) -> None:
        """context: the prompt, if the output continues its text; not part of the output. stops: stop_strings(params),
        if several streams share them. shown: special tokens that are not skipped. scope: None: all of the text.
        """
        self._decoder = IncrementalDecoder(tokenizer, params.skip_special_tokens, context, shown)
        self._params = params
        self._stops = stop_strings(params) if stops is None else stops
        self._matched = [0] * len(self._stops)
        self._scope = scope
        longest = max((len(stop.text) for stop in self._stops), default=0)
        self._places: deque[tuple[int, int]] = deque(maxlen=longest)  # begin and end of the last characters seen
        self._tokens = 0
        self._length = 0  # length of the text so far, including held-back text
        self._exempt = -1  # length of the text of the tokens before the `min_tokens`-th one; -1: all count
        self._held = ""

    def take(self, output: RequestOutput) -> Delta:
        """Convert the output of one round, cut where the output ends.

        The engine does not check stop strings: if one ends the output, the caller must abort the request there.
        """
        chunk = self.push(output.tokens, stop_token=output.finish_reason == FINISH_STOP)
        text, stopped, used = chunk.text, chunk.stopped, chunk.tokens_used
        if output.finish_reason is not None and stopped is None:
            rest = self.finish()
            text, stopped = text + rest.text, rest.stopped
        return Delta(
            text=text,
            tokens=output.tokens[:used],
            offsets=chunk.offsets,
            logprobs=None if output.logprobs is None else output.logprobs[:used],
            drafted=output.drafted,
            accepted=min(output.accepted, used),
            finish_reason=output.finish_reason if stopped is None else FINISH_STOP,
            stop_reason=output.stop_reason if stopped is None else stopped,
        )

    def push(self, tokens: Sequence[int], stop_token: bool = False) -> TextChunk:
        """Decode tokens and return the text that is certain.

        stop_token: the last of `tokens` is an end-of-sequence or stop token that ended the request. Such a token is
        part of the output but, unless include_stop_str_in_output is set, not of its text. Nothing may be pushed after a
        chunk that stopped.
        """
        ready: list[str] = []
        offsets: list[int] = []
        for used, token in enumerate(tokens, 1):
            self._tokens += 1
            if stop_token and used == len(tokens) and not self._params.include_stop_str_in_output:
                offsets.append(self._length)
                break
            piece = self._decoder.push(token)
            offsets.append(self._length + self._decoder.owed(token, piece))
            scoped = self._scope.feed(piece, token, offsets[-1]) if self._stops and self._scope else None
            if self._tokens < self._params.min_tokens:
                self._exempt = self._length + len(piece)
            if stopped := self._take(piece, scoped, ready):
                return TextChunk("".join(ready), offsets, stopped)
        return TextChunk("".join(ready), offsets)

    def finish(self) -> TextChunk:
        """Return the held-back text. Call it after the last token, if no chunk stopped."""
        ready: list[str] = []
        piece = self._decoder.flush()
        scoped = self._scope.finish(piece) if self._stops and self._scope else None
        stopped = self._take(piece, scoped, ready)
        if not stopped:
            ready.append(self._held)
            self._held = ""
        return TextChunk("".join(ready), [], stopped)

    def _take(self, piece: str, scoped: Sequence[Seen] | None, ready: list[str]) -> str | None:
        """Append the text that is now certain to `ready`. Returns the stop string that has been completed, if any.

        scoped: what became certain of the text that counts; None: `piece`.
        """
        first = self._length - len(self._held)  # offset of the text that is not in `ready` yet
        self._length += len(piece)
        if not self._stops:
            ready.append(piece)
            return None
        text = self._held + piece
        for seen in [Seen(piece, self._length - len(piece), self._length)] if scoped is None else scoped:
            for to_come, char in zip(range(len(seen.text) - 1, -1, -1), seen.text, strict=True):
                end = seen.end - to_come
                self._places.append((max(seen.begin, end - 1), max(seen.begin, end)))
                complete: list[str] = []
                for index, stop in enumerate(self._stops):
                    self._matched[index], whole = stop.feed(self._matched[index], char)
                    if whole:
                        complete.append(stop.text)
                if complete and end > self._exempt:
                    longest = max(complete, key=len)
                    keeps = self._params.include_stop_str_in_output
                    cut = self._places[-1][1] if keeps else self._places[-len(longest)][0]
                    ready.append(text[: max(0, cut - first)])
                    self._held = ""
                    return longest
        certain = self._length if self._scope is None else self._scope.decided
        if held := max(self._matched):
            certain = min(certain, self._places[-held][0])
        given = max(0, certain - first)
        ready.append(text[:given])
        self._held = text[given:]
        return None
