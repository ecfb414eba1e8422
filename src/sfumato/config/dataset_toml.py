"""The dataset file: [general], [[datasets]] and [[datasets.subsets]], whose keys are options of the same types."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from sfumato.common.registry import did_you_mean
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
    "metadata_file": "in_json",
}
OPTION_OF = {**DATASET_KEYS, **SUBSET_KEYS, **ONLY_SUBSET_KEYS}
PRESERVE = "diff_output_preservation"  # of custom_attributes: the target is the untrained model's own prediction

Place = tuple[str | int, ...]  # of a key: ("datasets", 0, "subsets", 1, "key")
TABLES = ("general", "datasets", "subsets")

KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "a text in quotes",
    "list": "a list",
    "dict": "a table",
    "path": "a path",
    "model": "a table",
}


def read_dataset_config(path: Path, problems: Problems) -> DatasetFile | None:
    """Read and check a .toml or .json dataset file; every fault in it is told, each with the path of its key.

    None where it cannot be read at all. Whether folders exist is not looked at here.
    """
    with problems.catch():
        content = parsed(path)
        whole, faulty = checked(path, content, problems)
        if whole is None:
            return None
        tables = whole.value("datasets")
        datasets = [entry_of(table, i, faulty) for i, table in enumerate(tables)]
        file = DatasetFile(path=path, general=whole.value("general"), datasets=tuple(datasets))
        for where, what, fix in contradictions(file):
            problems.add(f"{path}: {where}{what}", fix=fix)
        return file
    return None


def checked(path: Path, content: dict[str, Any], problems: Problems) -> tuple[Table | None, set[Place]]:
    """The tables without the keys that are wrong, and where those are; None where a whole table is wrong."""
    faulty: set[Place] = set()
    while True:
        try:
            return Whole.model_validate(content), faulty
        except ValidationError as error:
            for fault in error.errors(include_url=False):
                what, fix = described(fault)
                problems.add(f"{path}: {what}", fix=fix)
                faulty.add(fault["loc"])
        if any(place[-1] in TABLES or isinstance(place[-1], int) for place in faulty):
            return None, faulty
        for place in faulty:
            content = without(content, place)


def entry_of(table: Table, number: int, faulty: set[Place]) -> DatasetEntry:
    """One dataset; what a wrong key may have touched is marked, so that no fault is told that comes from another."""
    mine = [place for place in faulty if place[:2] == ("datasets", number)]
    sound = not any(place[0] == "general" for place in faulty) and all(len(place) > 3 for place in mine)
    inside = frozenset(int(place[3]) for place in mine if len(place) > 3)
    return DatasetEntry(table=table, subsets=tuple(table.value("subsets")), sound=sound, faulty=inside)


def without(content: Any, place: Place) -> Any:
    """Nested tables and lists without the key at this place."""
    key, *rest = place
    if not rest:
        return {name: value for name, value in content.items() if name != key}
    if isinstance(content, list):
        return [without(value, tuple(rest)) if i == key else value for i, value in enumerate(content)]
    return content | {key: without(content[key], tuple(rest))} if key in content else content


def parsed(path: Path) -> dict[str, Any]:
    """The file as nested dictionaries; UserError where it cannot be read."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})", fix="check --dataset_config") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path}, line {line}, is not UTF-8", fix="save the file as UTF-8") from error
    if path.suffix.lower() == ".toml":
        return of_toml(path, text)
    if path.suffix.lower() == ".json":
        return of_json(path, text)
    raise UserError(f"{path} is neither .toml nor .json", fix="give --dataset_config a .toml file")


def of_toml(path: Path, text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        said = str(error)
        if "Cannot overwrite" in said or "Cannot declare" in said:
            fix = "a key or table is given twice there; keep one"
        elif "Unescaped" in said or "escape" in said.lower():
            fix = "write paths with / or in 'single quotes'"
        else:
            fix = "mend the line named"
        raise UserError(f"{path} is not valid TOML: {said}", fix=fix) from error


def of_json(path: Path, text: str) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        for i, (key, _) in enumerate(pairs):
            if key in dict(pairs[:i]):
                raise UserError(f"{path}: key {key!r} is given twice in one object", fix="keep one")
        return dict(pairs)

    try:
        content = json.loads(text, object_pairs_hook=once)
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON: {error}", fix="mend the line named") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} does not hold a JSON object", fix='begin it with {"datasets": [')
    return content


def described(fault: Any) -> tuple[str, str]:
    """One of pydantic's faults as (what, fix), beginning with the path of the key."""
    place, kind, value = fault["loc"], fault["type"], fault["input"]
    shown = json.dumps(value, ensure_ascii=False, default=str)
    context = fault.get("ctx", {})
    where = dotted(place)
    if kind == "extra_forbidden":
        return f"unknown key {where}", whereabouts(place)
    if kind == "missing":
        return f"{where} is required", ""
    if kind == "literal_error":
        return f"{where} is {shown}", did_you_mean(str(value), vocabulary()[OPTION_OF[str(place[-1])]].choices)
    if kind == "value_error":
        return f"{where} = {shown} {context['error']}", ""
    limits = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
    for name, words in limits.items():
        if name in context:
            return f"{where} is {shown}, but must be {words} {context[name]}", ""
    wanted = next((words for name, words in KINDS.items() if kind.startswith(name)), "")
    return f"{where} is {shown}, not {wanted}" if wanted else f"{where} = {shown}: {fault['msg']}", ""


def dotted(place: Place) -> str:
    """("datasets", 0, "key") -> datasets[0].key"""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place)
    return text.removeprefix(".")


def whereabouts(place: Place) -> str:
    """The hint for an unknown key: where it belongs, what it is called here, or the nearest spelling."""
    key = str(place[-1])
    names = {"[general]": General, "[[datasets]]": Dataset, "[[datasets.subsets]]": Subset}
    table: type[Table] = {1: Whole, 2: General, 3: Dataset}.get(len(place), Subset)
    homes = [name for name, home in names.items() if key in home.model_fields and key != "subsets"]
    if homes:
        return f"it belongs in {' or '.join(homes)}"
    renamed = [name for name, option in OPTION_OF.items() if option == key and name in table.model_fields]
    return f"here it is called {renamed[0]!r}" if renamed else did_you_mean(key, table.model_fields)


def contradictions(file: DatasetFile) -> Iterator[tuple[str, str, str]]:
    """(where, what, fix) of faults that lie between keys."""
    if not file.datasets:
        yield "", "no [[datasets]]", "add a [[datasets]] table with a [[datasets.subsets]] table in it"
    for i, dataset in enumerate(file.datasets):
        if not dataset.subsets:
            yield f"datasets[{i}]", " has no subsets", "add a [[datasets.subsets]] table with image_dir below it"
        for j, subset in enumerate(dataset.subsets):
            where = f"datasets[{i}].subsets[{j}]"
            if subset.value("image_dir") is None and subset.value("metadata_file") is None and j not in dataset.faulty:
                yield f"{where}.image_dir", " is required", 'write image_dir = "folder/of/images"'
            if subset.value("metadata_file") is not None:
                for key in ("caption_extension", "cache_info"):
                    if subset.value(key):
                        yield f"{where}.{key}", " has no meaning beside metadata_file", "leave one of them out"
            if subset.value("is_reg") and subset.value("conditioning_data_dir") is not None:
                yield f"{where}.conditioning_data_dir", " has no meaning for regularisation images", "leave it out"
            preserve = (subset.value("custom_attributes") or {}).get(PRESERVE, False)
            if not isinstance(preserve, bool):
                yield f"{where}.custom_attributes.{PRESERVE}", " is neither true nor false", "write true or false"
        with_metadata = [subset.value("metadata_file") is not None for subset in dataset.subsets]
        if len(set(with_metadata)) > 1:
            yield (
                f"datasets[{i}]",
                " mixes subsets with and without metadata_file",
                "put them into datasets of their own",
            )


def keyed(keys: Mapping[str, str]) -> dict[str, Any]:
    """pydantic's field definitions for keys that are options: the option's type and limits, None where not given."""
    fields: dict[str, Any] = {}
    for key, name in keys.items():
        info = THEMES[vocabulary()[name].theme].model_fields[name]
        fields[key] = or_none(info.annotation, *info.metadata)
    if "num_repeats" in fields:  # 0 leaves a subset out
        fields["num_repeats"] = or_none(int, Field(ge=0))
    return fields


def or_none(kind: Any, *limits: Any) -> tuple[Any, None]:
    """A field definition with the default None."""
    kind = kind | None
    for limit in limits:
        kind = Annotated[kind, limit]
    return kind, None


class Table(BaseModel):
    """A table of the file; a key that is not given is None."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    def value(self, key: str) -> Any:
        """What the table says; None also where tables of its kind do not know the key."""
        return dict(self).get(key)


@dataclass(frozen=True, kw_only=True)
class DatasetEntry:
    """One of [[datasets]]."""

    table: Table
    subsets: tuple[Table, ...]
    sound: bool = True  # whether all its own keys, and those of [general], are right
    faulty: frozenset[int] = frozenset()  # subsets with wrong keys


@dataclass(frozen=True, kw_only=True)
class DatasetFile:
    """The whole file."""

    path: Path
    general: Table
    datasets: tuple[DatasetEntry, ...]


EVERYWHERE: dict[str, Any] = {
    **keyed(SUBSET_KEYS),
    "class_tokens": or_none(str),
    "custom_attributes": or_none(dict[str, Any]),
}
IN_DATASETS: dict[str, Any] = {
    **EVERYWHERE,
    **keyed(DATASET_KEYS),
    "network_multiplier": or_none(float),
}
IN_SUBSETS: dict[str, Any] = {
    **EVERYWHERE,
    **keyed(ONLY_SUBSET_KEYS),
    "image_dir": or_none(FilePath),
    "is_reg": or_none(bool),
}
General = create_model("General", __base__=Table, **IN_DATASETS)
Subset = create_model("Subset", __base__=Table, **IN_SUBSETS)
Dataset = create_model("Dataset", __base__=Table, **IN_DATASETS, subsets=(cast(Any, list)[Subset], []))
Whole = create_model("Whole", __base__=Table, general=(General, General()), datasets=(cast(Any, list)[Dataset], []))
