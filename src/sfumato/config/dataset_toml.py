"""Reads the dataset file: [general], [[datasets]] and [[datasets.subsets]], whose keys are typed like options."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from sfumato.common.json_toml import check_extent, decode_json, decode_toml
from sfumato.common.registry import did_you_mean
from sfumato.common.text import has_lone_surrogate
from sfumato.common.text_files import read_text_file
from sfumato.config.file_syntax import suggest_json_fix, suggest_toml_fix
from sfumato.config.schema import THEMES, vocabulary
from sfumato.config.values import FilePath
from sfumato.errors import Problems, UserError

# Keys that are options: the option of the same name, or the one named, gives the type, the limits and the default.
DATASET_KEYS = {
    **{
        name: name
        for name in (
            "resolution",
            "enable_bucket",
            "min_bucket_reso",
            "max_bucket_reso",
            "bucket_reso_steps",
            "bucket_no_upscale",
            "skip_image_resolution",
        )
    },
    "batch_size": "train_batch_size",
}
SUBSET_KEYS = {
    **{
        name: name
        for name in (
            "caption_extension",
            "caption_separator",
            "caption_prefix",
            "caption_suffix",
            "shuffle_caption",
            "keep_tokens",
            "keep_tokens_separator",
            "secondary_separator",
            "enable_wildcard",
            "token_warmup_min",
            "token_warmup_step",
            "caption_dropout_rate",
            "caption_dropout_every_n_epochs",
            "caption_tag_dropout_rate",
            "flip_aug",
            "color_aug",
            "random_crop",
            "face_crop_aug_range",
            "resize_interpolation",
            "cache_info",
            "validation_split",
            "validation_seed",
        )
    },
    "num_repeats": "dataset_repeats",
}
ONLY_SUBSET_KEYS = {
    "alpha_mask": "alpha_mask",
    "conditioning_data_dir": "conditioning_data_dir",
    "reference_data_dirs": "reference_data_dirs",
    "metadata_file": "in_json",
}
OPTION_OF_KEY = {**DATASET_KEYS, **SUBSET_KEYS, **ONLY_SUBSET_KEYS}
# Of custom_attributes: the target is the prediction of the untrained model.
PRESERVATION_KEY = "diff_output_preservation"
# Of custom_attributes: {offset = X}, which moves the subset's timesteps towards noise.
TIMESTEP_KEY, OFFSET_KEY = "timestep_sampling", "offset"

KeyPath = tuple[str | int, ...]  # e.g. ("datasets", 0, "subsets", 1, "key")
MAX_OFFSET = 4  # at most one sample in 30000 is beyond a normal number of this size
TABLES = ("general", "datasets", "subsets")

TYPE_NAMES = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "a text in quotes",
    "list": "a list",
    "dict": "a table",
    "path": "a path",
    "model": "a table",
}
LIMITS = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}


def read_dataset_config(path: Path, problems: Problems) -> DatasetFile | None:
    """Read and check a .toml or .json dataset file; every fault becomes a problem that names its key.

    None where the file cannot be read at all. Whether folders exist is not checked here.
    """
    with problems.catch():
        content = parse_dataset_file(path)
        root, faulty = validate_tables(path, content, problems)
        if root is None:
            return None
        entries = [make_entry(table, i, faulty) for i, table in enumerate(root.value("datasets"))]
        file = DatasetFile(path=path, general=root.value("general"), datasets=tuple(entries))
        check_datasets(file, problems)
        return file
    return None


def validate_tables(path: Path, content: dict[str, Any], problems: Problems) -> tuple[Table | None, set[KeyPath]]:
    """The tables without their wrong keys, and the paths of those; None where a whole table is wrong."""
    faulty: set[KeyPath] = set()
    while True:
        try:
            return RootTable.model_validate(content), faulty
        except ValidationError as error:
            for fault in error.errors(include_url=False):
                report_fault(path, fault, problems)
                faulty.add(fault["loc"])
        if any(key_path[-1] in TABLES or isinstance(key_path[-1], int) for key_path in faulty):
            return None, faulty
        for key_path in faulty:
            content = remove_key(content, key_path)


def make_entry(table: Table, number: int, faulty: set[KeyPath]) -> DatasetEntry:
    """One dataset; marks what a wrong key may have changed, so that no consequential fault is reported."""
    own_faults = [key_path for key_path in faulty if key_path[:2] == ("datasets", number)]
    general_is_valid = not any(key_path[0] == "general" for key_path in faulty)
    return DatasetEntry(
        table=table,
        subsets=tuple(table.value("subsets")),
        is_valid=general_is_valid and all(len(key_path) > 3 for key_path in own_faults),
        faulty_subsets=frozenset(int(key_path[3]) for key_path in own_faults if len(key_path) > 3),
    )


def remove_key(content: Any, key_path: KeyPath) -> Any:
    """A copy of nested tables and lists without the key at this path."""
    key, *rest = key_path
    if not rest:
        return {name: value for name, value in content.items() if name != key}
    if isinstance(content, list):
        return [remove_key(value, tuple(rest)) if i == key else value for i, value in enumerate(content)]
    return content | {key: remove_key(content[key], tuple(rest))} if key in content else content


def parse_dataset_file(path: Path) -> dict[str, Any]:
    """The file as nested dictionaries; UserError where it cannot be read."""
    try:
        text = read_text_file(path)
    except OSError as error:
        what = f"{path} cannot be read ({error.strerror})"
        raise UserError(what, code="dataset-file-unreadable", fix="check --dataset_config") from error
    if path.suffix.lower() == ".toml":
        return parse_toml(path, text)
    if path.suffix.lower() == ".json":
        return parse_json(path, text)
    what = f"{path} is neither .toml nor .json"
    raise UserError(what, code="dataset-file-suffix", fix="give --dataset_config a .toml file")


def parse_toml(path: Path, text: str) -> dict[str, Any]:
    try:
        return decode_toml(text)
    except ValueError as error:
        fix = suggest_toml_fix(text, error) or "fix that line"
        what = f"{path} is not valid TOML: {error}"
        raise UserError(what, code="dataset-file-invalid-toml", fix=fix) from error


def parse_json(path: Path, text: str) -> dict[str, Any]:
    def make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content: dict[str, Any] = {}
        for key, value in pairs:
            if key in content:
                what = f"{path}: key {key!r} is given twice in one object"
                raise UserError(what, code="dataset-json-key-twice", fix="keep one")
            content[key] = value
        return content

    try:
        content = decode_json(text, make_object=make_object)
        check_extent(content)
    except ValueError as error:
        what = f"{path} is not valid JSON: {error}"
        raise UserError(
            what, code="dataset-file-invalid-json", fix=suggest_json_fix(error, text) or "fix that line"
        ) from error
    if has_lone_surrogate(json.dumps(content, ensure_ascii=False)):
        what = f"{path} holds half of a letter, e.g. \\ud83d without what belongs to it"
        raise UserError(what, code="dataset-json-half-letter", fix="write that text again")
    if not isinstance(content, dict):
        what = f"{path} does not hold a JSON object"
        raise UserError(what, code="dataset-file-no-object", fix='start it with {"datasets": [')
    return content


def report_fault(path: Path, fault: Any, problems: Problems) -> None:
    """Turn one fault of pydantic into a problem that names the path of the key."""
    key_path, kind = fault["loc"], fault["type"]
    context = fault.get("ctx", {})
    value = json.dumps(fault["input"], ensure_ascii=False, default=str)
    where = f"{path}: {format_key_path(key_path)}"
    if kind == "extra_forbidden":
        what = f"{path}: unknown key {format_key_path(key_path)}"
        problems.add(what, code="dataset-key-unknown", fix=suggest_key(key_path))
        return
    if kind == "literal_error":
        fix = did_you_mean(str(fault["input"]), vocabulary()[OPTION_OF_KEY[str(key_path[-1])]].choices)
        problems.add(f"{where} is {value}", code="dataset-value-unknown", fix=fix)
        return
    if kind == "value_error":
        problems.add(f"{where} = {value} {context['error']}", code="dataset-value-malformed")
        return
    for limit in LIMITS:
        if limit in context:
            what = f"{where} is {value}, but must be {LIMITS[limit]} {context[limit]}"
            problems.add(what, code="dataset-value-out-of-range")
            return
    wanted = next((words for name, words in TYPE_NAMES.items() if kind.startswith(name)), "")
    what = f"{where} is {value}, not {wanted}" if wanted else f"{where} = {value}: {fault['msg']}"
    problems.add(what, code="dataset-value-wrong-type")


def format_key_path(key_path: KeyPath) -> str:
    """("datasets", 0, "key") -> datasets[0].key"""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in key_path)
    return text.removeprefix(".")


def suggest_key(key_path: KeyPath) -> str:
    """The fix for an unknown key: its table, its name in the file, or the nearest spelling."""
    key = str(key_path[-1])
    tables = {"[general]": GeneralTable, "[[datasets]]": DatasetTable, "[[datasets.subsets]]": SubsetTable}
    table: type[Table] = {1: RootTable, 2: GeneralTable, 3: DatasetTable}.get(len(key_path), SubsetTable)
    homes = [name for name, home in tables.items() if key in home.model_fields and key != "subsets"]
    if homes:
        return f"it belongs in {' or '.join(homes)}"
    renamed = [name for name, option in OPTION_OF_KEY.items() if option == key and name in table.model_fields]
    return f"here it is called {renamed[0]!r}" if renamed else did_you_mean(key, table.model_fields)


def check_datasets(file: DatasetFile, problems: Problems) -> None:
    """Add a problem for each contradiction between keys."""
    if not file.datasets:
        fix = "add a [[datasets]] table with a [[datasets.subsets]] table in it"
        problems.add(f"{file.path}: no [[datasets]]", code="dataset-list-missing", fix=fix)
    check_attributes(file.general, f"{file.path}: general", problems)
    for i, dataset in enumerate(file.datasets):
        where = f"{file.path}: datasets[{i}]"
        check_attributes(dataset.table, where, problems)
        if not dataset.subsets:
            fix = "add a [[datasets.subsets]] table with image_dir below it"
            problems.add(f"{where} has no subsets", code="dataset-without-subsets", fix=fix)
        for j, subset in enumerate(dataset.subsets):
            check_subset(subset, f"{where}.subsets[{j}]", j in dataset.faulty_subsets, problems)
        with_metadata = {subset.value("metadata_file") is not None for subset in dataset.subsets}
        if len(with_metadata) > 1:
            what = f"{where} mixes subsets with and without metadata_file"
            problems.add(what, code="subsets-mix-metadata", fix="put them into separate datasets")


def check_subset(subset: Table, where: str, is_faulty: bool, problems: Problems) -> None:
    """Add a problem for each contradiction between the keys of a subset."""
    if subset.value("image_dir") is None and subset.value("metadata_file") is None and not is_faulty:
        fix = 'write image_dir = "folder/of/images"'
        problems.add(f"{where}.image_dir is required", code="subset-folder-missing", fix=fix)
    if subset.value("metadata_file") is not None:
        for key in ("caption_extension", "cache_info"):
            if subset.value(key):
                what = f"{where}.{key} has no effect with metadata_file"
                problems.add(what, code="subset-key-with-metadata", fix="remove one of them")
    if subset.value("is_reg") and subset.value("conditioning_data_dir") is not None:
        what = f"{where}.conditioning_data_dir has no effect for regularization images"
        problems.add(what, code="subset-conditioning-for-regularization", fix="remove it")
    check_attributes(subset, where, problems)


def check_attributes(table: Table, where: str, problems: Problems) -> None:
    """Add a problem for each value of custom_attributes that cannot be used."""
    attributes = table.value("custom_attributes") or {}
    if not isinstance(attributes.get(PRESERVATION_KEY, False), bool):
        what = f"{where}.custom_attributes.{PRESERVATION_KEY} is neither true nor false"
        problems.add(what, code="subset-preservation-not-boolean", fix="write true or false")
    if TIMESTEP_KEY in attributes and not is_offset_table(attributes[TIMESTEP_KEY]):
        given = json.dumps(attributes[TIMESTEP_KEY], default=str)
        problems.add(
            f"{where}.custom_attributes.{TIMESTEP_KEY} is {given}",
            code="subset-timestep-offset-invalid",
            fix=f"write {TIMESTEP_KEY} = {{ {OFFSET_KEY} = -0.5 }}, a number from -{MAX_OFFSET} to {MAX_OFFSET}",
        )


def is_offset_table(value: Any) -> bool:
    """Whether it is {offset = X} with a number that leaves some noise and some image."""
    if not isinstance(value, dict) or set(value) != {OFFSET_KEY}:
        return False
    offset = value[OFFSET_KEY]
    return isinstance(offset, int | float) and not isinstance(offset, bool) and abs(offset) <= MAX_OFFSET


def make_fields(keys: Mapping[str, str]) -> dict[str, Any]:
    """Field definitions of pydantic for keys that are options: type and limits of the option, default None."""
    fields: dict[str, Any] = {}
    for key, name in keys.items():
        info = THEMES[vocabulary()[name].theme].model_fields[name]
        fields[key] = make_optional(info.annotation, *info.metadata)
    if "num_repeats" in fields:  # 0 skips a subset
        fields["num_repeats"] = make_optional(int, Field(ge=0))
    return fields


def make_optional(kind: Any, *limits: Any) -> tuple[Any, None]:
    """A field definition with the default None."""
    kind = kind | None
    for limit in limits:
        kind = Annotated[kind, limit]
    return kind, None


class Table(BaseModel):
    """A table of the file; None for keys that are not given."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    def value(self, key: str) -> Any:
        """The value of a key; None also for keys that this kind of table does not have."""
        return dict(self).get(key)


@dataclass(frozen=True, kw_only=True)
class DatasetEntry:
    """One of [[datasets]]."""

    table: Table
    subsets: tuple[Table, ...]
    is_valid: bool = True  # whether all its own keys and those of [general] are valid
    faulty_subsets: frozenset[int] = frozenset()  # subsets with wrong keys


@dataclass(frozen=True, kw_only=True)
class DatasetFile:
    """The whole file."""

    path: Path
    general: Table
    datasets: tuple[DatasetEntry, ...]


COMMON_FIELDS: dict[str, Any] = {
    **make_fields(SUBSET_KEYS),
    "class_tokens": make_optional(str),
    "custom_attributes": make_optional(dict[str, Any]),
}
DATASET_FIELDS: dict[str, Any] = {
    **COMMON_FIELDS,
    **make_fields(DATASET_KEYS),
    "network_multiplier": make_optional(float),
}
SUBSET_FIELDS: dict[str, Any] = {
    **COMMON_FIELDS,
    **make_fields(ONLY_SUBSET_KEYS),
    "image_dir": make_optional(FilePath),
    "is_reg": make_optional(bool),
}
GeneralTable = create_model("GeneralTable", __base__=Table, **DATASET_FIELDS)
SubsetTable = create_model("SubsetTable", __base__=Table, **SUBSET_FIELDS)
DatasetTable = create_model(
    "DatasetTable", __base__=Table, **DATASET_FIELDS, subsets=(cast(Any, list)[SubsetTable], [])
)
RootTable = create_model(
    "RootTable",
    __base__=Table,
    general=(GeneralTable, GeneralTable()),
    datasets=(cast(Any, list)[DatasetTable], []),
)
