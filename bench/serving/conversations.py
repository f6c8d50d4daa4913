"""Generate conversations: each turn sends the whole history, with the server's own answers in it, and new text."""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace

from bench.serving.load import Lengths, UserCall, passage


@dataclass(frozen=True, slots=True)
class UserTurn:
    """One turn. text: what the user says. output: number of tokens to generate. pause_s: time that the user thinks
    before it, from the end of the answer before."""

    text: str
    output: int
    pause_s: float


@dataclass(frozen=True, slots=True)
class Conversation:
    """A chat. system: system message; empty: none."""

    system: str
    turns: Sequence[UserTurn]

    def calls(self) -> Generator[UserCall, str, None]:
        """Yield each turn's call; the answer's text is sent back."""
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for number, turn in enumerate(self.turns, 1):
            messages.append({"role": "user", "content": turn.text})
            body = {"messages": list(messages), "max_tokens": turn.output}
            answer = yield UserCall("/v1/chat/completions", body, number, turn.pause_s)
            messages.append({"role": "assistant", "content": answer})

    def marked(self, mark: Sequence[int]) -> Conversation:
        """Return this conversation with the mark's numbers before its first message. What a chat template puts before
        that is the same for all."""
        words = f"{' '.join(map(str, mark))}: "
        if self.system:
            return replace(self, system=words + self.system)
        first, *others = self.turns
        return replace(self, turns=[replace(first, text=words + first.text), *others])


def conversations(
    tokens: Sequence[int],
    decode: Callable[[list[int]], str],
    count: int,
    turns: int,
    prompt: Lengths,
    output: Lengths,
    *,
    think_s: float,
    shared: int = 0,
    groups: int = 1,
    seed: int = 0,
) -> list[Conversation]:
    """Draw conversations of passages of a text, the same for the same seed.

    tokens: token ids of the text. decode: turns ids into text. prompt: tokens that the user adds per turn. think_s:
    mean time that a user thinks; drawn from an exponential distribution. shared: tokens of the system message that all
    conversations of a group share. groups: number of groups, to which conversations are assigned in turn. Raises
    BenchError if the text is too short.
    """
    rng = random.Random(seed)
    systems = [decode(passage(tokens, shared, rng)) for _ in range(groups)]
    found = []
    for i in range(count):
        made = []
        for number in range(turns):
            pause_s = rng.expovariate(1 / think_s) if number and think_s else 0.0
            made.append(UserTurn(decode(passage(tokens, prompt.draw(rng), rng)), output.draw(rng), pause_s))
        found.append(Conversation(systems[i % groups], made))
    return found
