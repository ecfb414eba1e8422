"""Reads the prompt file of concept training: TOML, YAML or JSON, in the forms of sd-scripts and ai-toolkit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from sfumato.common.json_toml import check_extent, decode_json, decode_toml
from sfumato.common.registry import did_you_mean
from sfumato.common.text_files import read_text_file
from sfumato.errors import UserError

Action = Literal["erase", "enhance"]
MAX_PROMPTS = 10_000
NEUTRAL_KEYS = ("neutral", "neutrals", "neutral_prompt_file", "prompt_file")


@dataclass(frozen=True, kw_only=True)
class Concept:
    """What one sample trains: the target's prediction becomes neutral -+ guidance_scale * (positive - unconditional).

    The four are prompts, and on the right stand the predictions of the model before training.
    """

    target: str
    positive: str
    unconditional: str
    neutral: str
    action: Action  # erase: minus, enhance: plus
    guidance_scale: float
    resolution: tuple[int, int]  # width, height in pixels
    dynamic_resolution: bool  # sides are anything from half of the resolution on
    batch_size: int
    dynamic_crops: bool  # random crops in the size conditioning
    multiplier: float  # strength of the adapter while this is trained
    weight: float  # in the loss

    @property
    def prompts(self) -> tuple[str, str, str, str]:
        return self.target, self.positive, self.unconditional, self.neutral

    @property
    def direction(self) -> float:
        """The factor of positive - unconditional."""
        return -self.guidance_scale if self.action == "erase" else self.guidance_scale


def read_concepts(path: Path) -> list[Concept]:
    """All concepts of a file, sliders as the two or four that they stand for; UserError that names file and entry."""
    concepts: list[Concept] = []
    for where, table, defaults in list_concept_tables(path, parse_concept_file(path)):
        if "target_class" in table or "target_class" in defaults:
            concepts += expand_slider(path, validate(where, SliderTable, table, defaults))
        else:
            concepts.append(make_concept(validate(where, PromptTable, table, defaults)))
        if len(concepts) > MAX_PROMPTS:
            raise UserError(f"{path} has more than {MAX_PROMPTS} concepts", code="concept-file-too-long")
    return concepts


def parse_concept_file(path: Path) -> dict[str, Any]:
    """The file as nested dictionaries; a bare list is one of [[prompts]]."""
    readers = {".toml": decode_toml, ".json": decode_json, ".yaml": yaml.safe_load, ".yml": yaml.safe_load}
    if path.suffix.lower() not in readers:
        raise UserError(
            f"{path} is neither .toml, .yaml nor .json", code="concept-file-suffix", fix="save it as TOML or YAML"
        )
    try:
        content = readers[path.suffix.lower()](read_text_file(path))
        check_extent(content)
    except OSError as error:
        what = f"{path} cannot be read ({error.strerror})"
        raise UserError(what, code="concept-file-unreadable", fix="check --prompts_file") from error
    except (ValueError, yaml.YAMLError) as error:
        what = f"{path} cannot be parsed: {error}"
        raise UserError(what, code="concept-file-invalid", fix="fix that line") from error
    content = {"prompts": content} if isinstance(content, list) else content
    if not isinstance(content, dict) or not content:
        raise make_empty_error(path)
    return content


def make_empty_error(path: Path) -> UserError:
    return UserError(
        f"{path} has no prompts",
        code="concept-file-empty",
        fix='write [[prompts]] with target = "...", or [[targets]] with target_class, positive and negative',
    )


def list_concept_tables(
    path: Path, content: Mapping[str, Any]
) -> Iterator[tuple[str, Mapping[str, Any], Mapping[str, Any]]]:
    """Each entry with its place in the file, and the keys beside the list of entries, which are defaults."""
    content = content.get("slider", content)
    name = next((key for key in ("prompts", "targets") if isinstance(content, dict) and key in content), None)
    if not isinstance(content, dict) or (name is None and not {"target", "target_class"} & content.keys()):
        raise make_empty_error(path)
    if name is None:
        yield str(path), content, {}
        return
    tables = content[name]
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise make_empty_error(path)
    for i, table in enumerate(tables):
        yield f"{path}: {name}[{i}]", table, {key: value for key, value in content.items() if key != name}


def validate(where: str, kind: type[TableT], table: Mapping[str, Any], defaults: Mapping[str, Any]) -> TableT:
    """A checked table; the neutral prompts of an entry replace those of all. UserError for the first fault."""
    if any(key in table for key in NEUTRAL_KEYS):
        defaults = {key: value for key, value in defaults.items() if key not in NEUTRAL_KEYS}
    merged = {key: value for key, value in {**defaults, **table}.items() if value is not None}
    try:
        return kind.model_validate(merged)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        raise UserError(
            f"{where}: unknown key {key}", code="concept-key-unknown", fix=did_you_mean(key, kind.model_fields)
        )
    if fault["type"] == "missing":
        raise UserError(f"{where} has no {key}", code="concept-key-missing", fix=f'write {key} = "..."')
    message = fault["msg"].removeprefix("Value error, ")
    raise UserError(f"{where}: {key} = {fault['input']!r}: {message}", code="concept-value-invalid")


def make_concept(table: PromptTable) -> Concept:
    values = dict(table)
    values["positive"] = table.target if table.positive is None else table.positive
    values["neutral"] = table.unconditional if table.neutral is None else table.neutral
    return Concept(**values)


def expand_slider(path: Path, table: SliderTable) -> Iterator[Concept]:
    """Both directions of a slider, at strengths of both signs, for each neutral prompt and resolution.

    More of `positive` and less of `negative` at the multiplier, the opposite at its negative; with one of the two
    prompts alone, more or less of that one.
    """
    positive, negative, strength = table.positive, table.negative, table.multiplier
    if positive.strip() and negative.strip():
        pairs = [(negative, positive, "erase", strength), (positive, negative, "enhance", strength)]
        pairs += [(positive, negative, "erase", -strength), (negative, positive, "enhance", -strength)]
    elif negative.strip():
        pairs = [(negative, "", "erase", strength), (negative, "", "enhance", -strength)]
    elif positive.strip():
        pairs = [(positive, "", "enhance", strength), (positive, "", "erase", -strength)]
    else:
        raise UserError(
            f"{path}: the slider of {table.target_class!r} has neither a positive nor a negative prompt",
            code="concept-slider-without-prompts",
            fix="give one or both",
        )
    shared = {key: value for key, value in table if key in SharedTable.model_fields and key != "multiplier"}
    for neutral in list_neutrals(path, table):
        for resolution in table.resolutions or (table.resolution,):
            for prompt, unconditional, action, multiplier in pairs:
                values = {**shared, "resolution": resolution, "multiplier": multiplier, "action": action}
                yield Concept(
                    target=table.target_class, positive=prompt, unconditional=unconditional, neutral=neutral, **values
                )


def list_neutrals(path: Path, table: SliderTable) -> list[str]:
    """The neutral prompts of the table and of the files that it names, which lie beside the prompt file."""
    neutrals = list(table.neutrals)
    for name in (table.neutral_prompt_file, table.prompt_file):
        if name is not None:
            try:
                lines = read_text_file(path.parent / name).splitlines()
            except OSError as error:
                what = f"{path}: {name} cannot be read ({error.strerror})"
                raise UserError(what, code="concept-neutrals-unreadable", fix="give a file beside it") from error
            neutrals += [line.strip() for line in lines if line.strip()]
    return neutrals or [table.neutral]


def read_sides(value: Any) -> Any:
    """A side, or [height, width] -> (width, height)."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = [value, value]
    if isinstance(value, list | tuple) and len(value) == 2 and all(type(side) is int for side in value):
        if all(64 <= side <= 16384 for side in value):
            return value[1], value[0]
    raise ValueError("a side in pixels is expected, or [height, width], each 64 or more")


Sides = Annotated[tuple[int, int], BeforeValidator(read_sides)]


class SharedTable(BaseModel):
    """The keys of prompts and sliders alike."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    guidance_scale: float = 1.0
    resolution: Sides = (512, 512)
    dynamic_resolution: bool = False
    batch_size: int = Field(1, ge=1)
    dynamic_crops: bool = False
    multiplier: float = 1.0
    weight: float = Field(1.0, gt=0)

    @field_validator("multiplier")
    @classmethod
    def check_multiplier(cls, value: float) -> float:
        if value == 0:
            raise ValueError("at strength 0 an adapter learns nothing")
        return value


class PromptTable(SharedTable):
    """One of [[prompts]]."""

    target: str
    positive: str | None = None
    unconditional: str = ""
    neutral: str | None = None
    action: Action = "erase"


class SliderTable(SharedTable):
    """One of [[targets]]."""

    target_class: str
    positive: str = ""
    negative: str = ""
    neutral: str = ""
    neutrals: list[str] = []
    neutral_prompt_file: str | None = None
    prompt_file: str | None = None
    resolutions: list[Sides] = []


TableT = TypeVar("TableT", bound=SharedTable)
