"""The tokens of captions, counted in a thread while the page is already there."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Mapping

from sfumato.data.captions import CaptionRules, parse_caption_file
from sfumato.data.find.inspect import CountTokens
from sfumato.data.prompt_weighting import parse_weights, strip_weights
from sfumato.data.variants import make_longest_variant
from sfumato.errors import UserError

CAPTIONS_AT_ONCE = 512
Tokenizers = Mapping[str, tuple[CountTokens, int]]  # name -> token counter and limit
TokenCounts = Mapping[str, int]  # tokenizer -> tokens


class TokenCounter:
    """TokenCounts what it is given, and remembers it. load: makes the tokenizers, which takes seconds.

    `fault` says why nothing can be counted.
    """

    def __init__(self, load: Callable[[], Tokenizers], *, weighted: bool = False) -> None:
        self.tokenizers: Tokenizers = {}
        self.is_loaded = False
        self.fault = ""
        self._load, self._weighted = load, weighted
        self._known: dict[str, TokenCounts] = {}
        self._waiting: dict[str, None] = {}
        self._wake = threading.Condition()
        self._is_over = False

    def start(self, on_counted: Callable[[], None]) -> None:
        """on_counted: called in the thread after each batch, and when the tokenizers are there."""
        threading.Thread(target=self._run, args=(on_counted,), name="sfumato-tokens", daemon=True).start()

    def stop(self) -> None:
        with self._wake:
            self._is_over = True
            self._wake.notify()

    @property
    def pending(self) -> int:
        return 0 if self.fault else len(self._waiting)

    def get(self, caption: str) -> TokenCounts | None:
        """None where it has not been counted yet."""
        return self._known.get(caption)

    def request(self, captions: Iterable[str]) -> None:
        with self._wake:
            self._waiting.update(dict.fromkeys(caption for caption in captions if caption not in self._known))
            self._wake.notify()

    def count(self, caption: str) -> TokenCounts:
        """At once; nothing as long as there are no tokenizers."""
        return {name: count([caption])[0] for name, (count, _) in self.tokenizers.items()}

    def exceeds(self, counts: TokenCounts) -> bool:
        return any(counts[name] > limit for name, (_, limit) in self.tokenizers.items() if name in counts)

    def prepare(self, text: str, rules: CaptionRules) -> str:
        """The caption as it will be encoded: with prefix and suffix, without weights."""
        lines = parse_caption_file(text)
        caption = make_longest_variant(lines if rules.enable_wildcard else lines.split("\n")[0], rules)
        return strip_weights(parse_weights(caption)) if self._weighted else caption

    def find_cut(self, text: str, rules: CaptionRules) -> int | None:
        """How many letters of a text the encoder with the fewest tokens reads; None where it is not cut.

        Whole words alone are looked at: the true place may be some letters later.
        """
        counts = self.count(self.prepare(text, rules))
        if not self.exceeds(counts):
            return None
        ends = [match.end() for match in re.finditer(r"\S+", text)]
        low, high = 0, len(ends)  # as many words fit, and do not
        while high - low > 1:
            middle = (low + high) // 2
            fits = not self.exceeds(self.count(self.prepare(text[: ends[middle - 1]], rules)))
            low, high = (middle, high) if fits else (low, middle)
        return ends[low - 1] if low else 0

    def _run(self, on_counted: Callable[[], None]) -> None:
        try:
            self.tokenizers = self._load()
        except UserError as error:
            self.fault = str(error)
        self.is_loaded = True
        on_counted()
        while not self.fault:
            with self._wake:
                self._wake.wait_for(lambda: self._waiting or self._is_over)
                if self._is_over:
                    return
                batch = list(self._waiting)[:CAPTIONS_AT_ONCE]
            counted = {name: count(batch) for name, (count, _) in self.tokenizers.items()}
            with self._wake:
                for row, caption in enumerate(batch):
                    self._known[caption] = {name: numbers[row] for name, numbers in counted.items()}
                    del self._waiting[caption]
            on_counted()
