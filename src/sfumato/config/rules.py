"""All rules between options, as data: each with the reason and what to do."""

from __future__ import annotations

from collections.abc import Iterator

from sfumato.config.data_rules import DATA_RULES
from sfumato.config.embedding_rules import EMBEDDING_RULES
from sfumato.config.leco_rules import LECO_RULES, is_leco
from sfumato.config.network_rules import NETWORK_RULES
from sfumato.config.noise_rules import NOISE_RULES
from sfumato.config.optim_rules import OPTIM_RULES
from sfumato.config.option_rule import OptionRule
from sfumato.config.output_rules import OUTPUT_RULES
from sfumato.config.precision_rules import PRECISION_RULES
from sfumato.config.process_rules import PROCESS_RULES
from sfumato.config.schema import Config


def broken_rules(config: Config, suspects: set[str]) -> Iterator[OptionRule]:
    """The rules that a config breaks, without those that concern an option of `suspects`."""
    for rule in RULES:
        if not suspects.intersection(rule.options) and rule.is_broken(config):
            yield rule


def has_data(config: Config) -> bool:
    return config.is_changed("train_data_dir", "dataset_config", "in_json", "dataset_class")


MODEL_RULES = (
    OptionRule(
        code="model-missing",
        severity="required",
        options=("pretrained_model_name_or_path",),
        is_broken=lambda c: c.model.pretrained_model_name_or_path is None,
        what="no model to start from",
        fix="give --pretrained_model_name_or_path",
    ),
    OptionRule(
        code="data-missing",
        severity="required",
        options=("train_data_dir", "dataset_config", "in_json", "dataset_class"),
        is_broken=lambda c: not has_data(c) and not is_leco(c),
        what="no images to train on",
        fix="give --train_data_dir or --dataset_config",
    ),
    OptionRule(
        code="output-missing",
        severity="required",
        options=("output_dir",),
        is_broken=lambda c: c.save.output_dir is None,
        what="no folder to save into",
        fix="give --output_dir",
    ),
    OptionRule(
        code="family-and-model-type-differ",
        severity="conflict",
        options=("family", "model_type"),
        is_broken=lambda c: (
            c.source("family") != "launcher"
            and None not in (c.run.family, c.model.model_type)
            and c.run.family != c.model.model_type
        ),
        what="--family and --model_type name two different model families",
        fix="remove --model_type",
    ),
)

_SETTING_RULES = NETWORK_RULES + EMBEDDING_RULES + LECO_RULES + NOISE_RULES + OPTIM_RULES + PRECISION_RULES
RULES = MODEL_RULES + DATA_RULES + _SETTING_RULES + OUTPUT_RULES + PROCESS_RULES
