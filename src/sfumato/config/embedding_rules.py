"""Rules between the options of textual inversion."""

from __future__ import annotations

from sfumato.config.embedding import EmbeddingOptions
from sfumato.config.network import FullOptions
from sfumato.config.network_rules import TEXT_ENCODER_LRS
from sfumato.config.option_rule import OptionRule
from sfumato.config.schema import Config

METHODS_WITH_WORDS = ("adapter", "textual_inversion")
OTHER_LRS = ("unet_lr", "text_encoder_lr", "block_lr", *TEXT_ENCODER_LRS)


def is_inversion(config: Config) -> bool:
    return config.run.method == "textual_inversion"


def has_wrong_count(config: Config) -> bool:
    """Whether a list has another number of values than there are words."""
    options = config.embedding
    words = len(options.token_string)
    counts = (len(options.init_word), len(options.weights))
    single = len(options.num_vectors_per_token) in (1, words)
    return bool(words) and (not single or any(count not in (0, words) for count in counts))


EMBEDDING_RULES = (
    OptionRule(
        code="token-string-missing",
        severity="conflict",
        options=("method", "token_string"),
        is_broken=lambda c: is_inversion(c) and not c.embedding.token_string,
        what="textual inversion trains the vectors of a new word, and none is given",
        fix="--token_string WORD, which stands in the captions",
    ),
    OptionRule(
        code="token-string-with-other-method",
        severity="conflict",
        options=("method", "token_string"),
        is_broken=lambda c: bool(c.embedding.token_string) and c.run.method not in METHODS_WITH_WORDS,
        what="--token_string gives new words, which are trained alone or with an adapter",
        fix="give --method textual_inversion or adapter",
    ),
    OptionRule(
        code="token-string-counts-differ",
        severity="conflict",
        options=("token_string", "init_word", "num_vectors_per_token", "weights"),
        is_broken=has_wrong_count,
        what="--init_word, --weights and --num_vectors_per_token need a value for each word of --token_string",
        fix='give as many; a text of several words is one value in quotes: --init_word "oil painting"',
    ),
    OptionRule(
        code="two-templates",
        severity="conflict",
        options=("use_object_template", "use_style_template"),
        is_broken=lambda c: c.embedding.use_object_template and c.embedding.use_style_template,
        what="--use_object_template and --use_style_template both replace the captions",
        fix="give one of them",
    ),
    OptionRule(
        code="embedding-options-without-token-string",
        severity="no effect",
        options=tuple(EmbeddingOptions.model_fields),
        is_broken=lambda c: (
            not c.embedding.token_string and not is_inversion(c) and c.is_changed(*EmbeddingOptions.model_fields)
        ),
        what="--init_word, --num_vectors_per_token, --weights, the templates and --embedding_lr",
        reason="there is no --token_string",
        fix="remove them, or give --token_string",
    ),
    OptionRule(
        code="init-word-unused",
        severity="no effect",
        options=("init_word", "weights"),
        is_broken=lambda c: bool(c.embedding.init_word and c.embedding.weights),
        what="--init_word",
        reason="the vectors start from --weights",
        fix="remove it",
    ),
    OptionRule(
        code="learning-rates-in-textual-inversion",
        severity="no effect",
        options=("method", *OTHER_LRS, *FullOptions.model_fields),
        is_broken=lambda c: is_inversion(c) and c.is_changed(*OTHER_LRS, *FullOptions.model_fields),
        what="the learning rates of networks and the options of full training",
        reason="the new vectors alone are trained",
        fix="remove them; the learning rate is --learning_rate",
    ),
)
