"""New words of captions and prompts: each stands for vectors of its own in every text encoder."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sfumato.common.text import plural
from sfumato.config import Config
from sfumato.data.plans import DataPlan
from sfumato.errors import Problems, UserError
from sfumato.families.blueprint import Blueprint
from sfumato.families.new_tokens import find_token_ids, is_known_token, make_letters
from sfumato.formats.embedding_file import EmbeddingFile, read_bundled_embeddings, read_embedding_file


@dataclass(frozen=True, kw_only=True)
class NewWord:
    """A word, and what its vectors start from."""

    text: str
    vectors: int
    letters: str  # that stand for its vectors in front of the tokenizers
    init: str = ""  # text whose vectors it starts from
    file: EmbeddingFile | None = None  # that holds its vectors


class NewWords(Sequence[NewWord]):
    """The new words of a run, in order."""

    def __init__(self, words: Sequence[NewWord] = ()) -> None:
        self._words = tuple(words)
        longest_first = sorted((word.text for word in words), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(make_pattern, longest_first)), re.IGNORECASE)
        self._letters = {word.text.lower(): " ".join(word.letters) for word in words}

    def __len__(self) -> int:
        return len(self._words)

    def __getitem__(self, index: Any) -> Any:
        return self._words[index]

    @property
    def letters(self) -> str:
        """Of all words."""
        return "".join(word.letters for word in self._words)

    def replace(self, text: str) -> str:
        """A caption or prompt with the letters in place of the words."""
        return self._pattern.sub(lambda match: self._letters[match[0].lower()], text) if self._words else text

    def find(self, text: str) -> set[str]:
        """The words that a caption or prompt names, in lower case."""
        return {match[0].lower() for match in self._pattern.finditer(text)} if self._words else set()


def make_pattern(word: str) -> str:
    """An expression for a word that is no part of a longer one."""
    start = r"(?<!\w)" if word[0].isalnum() else ""
    return start + re.escape(word) + (r"(?!\w)" if word[-1].isalnum() else "")


def number_words(words: Sequence[tuple[str, int, str, EmbeddingFile | None]]) -> NewWords:
    """Words of (text, vectors, initial text, file), with letters of their own."""
    numbered: list[NewWord] = []
    start = 0
    for text, vectors, init, file in words:
        letters = make_letters(start, vectors)
        numbered.append(NewWord(text=text, vectors=vectors, letters=letters, init=init, file=file))
        start += vectors
    return NewWords(numbered)


def read_new_words(config: Config) -> NewWords:
    """The words of --token_string with their files; UserError for a file that is none."""
    options = config.embedding
    count = len(options.token_string)
    given = options.num_vectors_per_token
    vectors = given if len(given) == count else given * count
    inits = options.init_word or ("",) * count
    files = read_start_files(config)
    words: list[tuple[str, int, str, EmbeddingFile | None]] = []
    for text, number, init, file in zip(options.token_string, vectors, inits, files, strict=True):
        if file is not None:
            number = count_vectors(file, number if config.is_changed("num_vectors_per_token") else None)
        words.append((text, number, init, file))
    return number_words(words)


def read_start_files(config: Config) -> list[EmbeddingFile | None]:
    """The file that each word starts from: of --weights, else the adapter file that training continues from."""
    options, adapter = config.embedding, config.network.network_weights
    if options.weights:
        return [read_embedding_file(path) for path in options.weights]
    bundled = read_bundled_embeddings(adapter) if adapter is not None and options.token_string else {}
    by_word = {word.lower(): file for word, file in bundled.items()}
    return [by_word.get(word.lower()) for word in options.token_string]


def count_vectors(file: EmbeddingFile, wanted: int | None) -> int:
    """Vectors of a file's word. UserError where the options ask for another number."""
    count = max(len(vectors) for vectors in file.vectors.values())
    if wanted not in (None, count):
        raise UserError(
            f"{file.path} holds {plural(count, 'vector')}, --num_vectors_per_token asks for {wanted}",
            code="embedding-vector-count",
            fix=f"--num_vectors_per_token {count}, or start without the file",
        )
    return count


def read_embedding_names(blueprint: Blueprint) -> dict[str, str]:
    """Text encoder -> the name of its vectors in files."""
    return {part: blueprint.networks[part].spec.embedding_name for part in blueprint.text_parts}


def check_words_are_new(config: Config, tokenizers: Mapping[str, Any], problems: Problems) -> None:
    """A problem for each word that a tokenizer knows as one token, and for texts without tokens to start from."""
    for word in config.embedding.token_string:
        for part, tokenizer in tokenizers.items():
            if is_known_token(tokenizer, word):
                problems.add(
                    f"--token_string {word}: it is a token of {part} already, whose meaning every prompt would lose",
                    code="token-string-known",
                    fix=f"give a word that does not exist, e.g. --token_string {word}-new",
                )
                break
    for init in config.embedding.init_word:
        empty = [part for part, tokenizer in tokenizers.items() if not find_token_ids(tokenizer, init)]
        if empty:
            problems.add(f"--init_word {init!r} has no tokens", code="init-word-empty", fix="give a word")


def check_words_in_captions(config: Config, data: DataPlan, problems: Problems) -> None:
    """A problem for each word that no caption names, whose vectors would stay as they are."""
    options = config.embedding
    if not options.token_string or options.use_object_template or options.use_style_template:
        return
    words = number_words([(text, 1, "", None) for text in options.token_string])
    missing = {text.lower() for text in options.token_string}
    for _, subset, item in data.iterate_used():
        rules = subset.settings.rules
        missing -= words.find(f"{rules.caption_prefix or ''} {item.image.caption} {rules.caption_suffix or ''}")
        if not missing:
            return
    if data.num_train_images:
        problems.add(
            f"--token_string: no caption names {' or '.join(sorted(missing))}, so that nothing would train it",
            code="token-string-in-no-caption",
            fix="write it into the captions, or give --caption_prefix, --use_object_template or --use_style_template",
        )


def describe_init_words(config: Config, tokenizers: Mapping[str, Any]) -> list[str]:
    """A line for each word with more or fewer vectors than its initial text has tokens."""
    lines: list[str] = []
    for word in read_new_words(config) if config.embedding.init_word and not config.embedding.weights else ():
        counts = {part: len(find_token_ids(tokenizer, word.init)) for part, tokenizer in tokenizers.items()}
        if set(counts.values()) - {word.vectors}:
            tokens = ", ".join(f"{count} in {part}" for part, count in counts.items())
            lines.append(
                f"--init_word {word.init!r} has another number of tokens ({tokens}) than {word.text} has vectors "
                f"({word.vectors}); they are repeated or cut"
            )
    return lines
