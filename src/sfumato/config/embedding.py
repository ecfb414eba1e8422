"""Options of new words that stand for trained vectors: textual inversion, alone or with an adapter."""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator

from sfumato.config.base import Metavar, Options, option
from sfumato.config.values import Counts, FilePaths, to_tuple

NOT_IN_WORDS = re.compile(r"[\s,{}|]")  # letters that divide captions into tags and alternatives


def check_words(words: tuple[str, ...]) -> tuple[str, ...]:
    """ValueError for what captions cannot name, and for words that they cannot tell apart."""
    for word in words:
        found = NOT_IN_WORDS.search(word)
        if not word or found:
            raise ValueError(f"{word!r} is not one word" + (f": it holds {found[0]!r}" if found else ""))
    if len({word.lower() for word in words}) < len(words):
        raise ValueError("names a word twice")
    return words


WordList = Annotated[tuple[str, ...], BeforeValidator(to_tuple), AfterValidator(check_words), Metavar("WORD ...")]
TextList = Annotated[tuple[str, ...], BeforeValidator(to_tuple), Metavar("TEXT ...")]


class EmbeddingOptions(Options):
    """Textual inversion"""

    token_string: WordList = option((), "new words of captions and prompts, which stand for trained vectors")
    init_word: TextList = option(
        (), "text whose vectors a new word starts from, one for each --token_string; default: random vectors"
    )
    num_vectors_per_token: Counts = option((1,), "vectors of a new word: one number for all, or one for each")
    weights: FilePaths = option(
        (), "files of textual inversion to continue from, one for each --token_string", path="file"
    )
    use_object_template: bool = option(False, "replace every caption by one of several about an object")
    use_style_template: bool = option(False, "replace every caption by one of several about a style")
    embedding_lr: float | None = option(None, "learning rate of the new vectors; default: --learning_rate", ge=0)
