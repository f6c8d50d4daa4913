"""Output tokens to output text: incremental, cut at the first stop string. Free of torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from engine.messages import FINISH_STOP, RequestOutput, TokenLogprobs
from engine.params import SamplingParams
from models.tokenizer import IncrementalDecoder, Tokenizer


@dataclass(frozen=True, slots=True)
class TextChunk:
    """What one round's tokens added to the text."""

    text: str
    tokens_used: int
    """How many of the round's tokens belong to the output; fewer than all only when `stopped`."""
    stopped: str | None = None
    """The stop string that ended the output."""


@dataclass(frozen=True, slots=True)
class Delta:
    """What one round added to a request's output. The last one carries finish_reason."""

    text: str
    tokens: list[int]
    logprobs: list[TokenLogprobs] | None
    """One per token, if asked for."""
    drafted: int
    accepted: int
    finish_reason: str | None
    stop_reason: int | str | None
    """The stop string or stop token that ended it; None for the model's own end of text."""


class TextStream:
    """The text of one request. Chunks join to the same text however its tokens were split into rounds.

    Text that may be the beginning of a stop string is held back until that is decided. A stop string counts
    when the token that completes it is the `min_tokens`-th or a later one.
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams, context: Sequence[int] = ()) -> None:
        """`context`: the prompt, where the output continues its text; not part of the output."""
        self._decoder = IncrementalDecoder(tokenizer, params.skip_special_tokens, context)
        self._params = params
        self._matchers = [_Matcher(stop) for stop in params.stop if stop]
        self._tokens = 0
        self._held = ""

    def take(self, output: RequestOutput) -> Delta:
        """The text of one round, and its numbers, cut where the output ends.

        If a stop string ended it, the engine has not heard of that yet: abort the request there.
        """
        chunk = self.push(output.tokens, stop_token=output.finish_reason == FINISH_STOP)
        text, stopped, used = chunk.text, chunk.stopped, chunk.tokens_used
        if output.finish_reason is not None and stopped is None:
            rest = self.finish()
            text, stopped = text + rest.text, rest.stopped
        return Delta(
            text=text,
            tokens=output.tokens[:used],
            logprobs=None if output.logprobs is None else output.logprobs[:used],
            drafted=output.drafted,
            accepted=min(output.accepted, used),
            finish_reason=output.finish_reason if stopped is None else FINISH_STOP,
            stop_reason=output.stop_reason if stopped is None else stopped,
        )

    def push(self, tokens: Sequence[int], stop_token: bool = False) -> TextChunk:
        """`stop_token`: the last of `tokens` is an end-of-sequence or stop token that ended the request.

        Such a token is part of the output but, unless include_stop_str_in_output, not of its text. Nothing
        may be pushed after a chunk that stopped.
        """
        ready: list[str] = []
        for used, token in enumerate(tokens, 1):
            self._tokens += 1
            if stop_token and used == len(tokens) and not self._params.include_stop_str_in_output:
                break
            if stopped := self._take(self._decoder.push(token), ready):
                return TextChunk("".join(ready), used, stopped)
        return TextChunk("".join(ready), len(tokens))

    def finish(self) -> TextChunk:
        """The text still held back, once the last token was pushed and nothing stopped the text."""
        ready: list[str] = []
        stopped = self._take(self._decoder.flush(), ready)
        if not stopped:
            ready.append(self._held)
            self._held = ""
        return TextChunk("".join(ready), 0, stopped)

    def _take(self, piece: str, ready: list[str]) -> str | None:
        """Move what is now certain to `ready`; return the stop string that `piece` completes."""
        if not piece:
            return None
        if not self._matchers:
            ready.append(piece)
            return None
        text, before = self._held + piece, len(self._held)
        for position, char in enumerate(piece, before + 1):
            complete = [matcher for matcher in self._matchers if matcher.feed(char)]
            if complete and self._tokens >= self._params.min_tokens:
                longest = max(complete, key=lambda matcher: len(matcher.pattern))
                dropped = 0 if self._params.include_stop_str_in_output else len(longest.pattern)
                ready.append(text[: position - dropped])
                self._held = ""
                return longest.pattern
        held = max(matcher.matched for matcher in self._matchers)
        ready.append(text[: len(text) - held])
        self._held = text[len(text) - held :]
        return None


class _Matcher:
    """Knuth-Morris-Pratt: one pattern against text that arrives one character at a time.

    matched: length of the longest proper prefix of the pattern that the text so far ends with.
    """

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.matched = 0
        # border[i]: length of the longest proper prefix of pattern[:i] that is also its suffix.
        self._border = [0, 0]
        for char in pattern[1:]:
            self._border.append(self._extend(self._border[-1], char))

    def feed(self, char: str) -> bool:
        """Whether the text now ends with the pattern."""
        self.matched = self._extend(self.matched, char)
        if self.matched < len(self.pattern):
            return False
        self.matched = self._border[self.matched]
        return True

    def _extend(self, matched: int, char: str) -> int:
        while matched and self.pattern[matched] != char:
            matched = self._border[matched]
        return matched + 1 if self.pattern[matched] == char else 0
