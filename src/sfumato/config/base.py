"""An option: a typed field with a help line and a few facts; options are grouped in themes."""

from __future__ import annotations

import types
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, SecretStr
from pydantic.fields import FieldInfo

# "any": a file or a folder; "model": also a name on the hub; "encoder": such a model, whose cached outputs may do
PathKind = Literal["", "file", "folder", "any", "model", "encoder"]


def option(
    default: Any,
    help: str,
    *,
    no_effect: str = "",
    path: PathKind = "",
    required: bool = False,
    positional: bool = False,
    repeatable: bool = False,
    **limits: Any,
) -> Any:
    """Declare one option: a pydantic field whose name is the option's name.

    no_effect: why the option changes nothing here; it is accepted and reported.
    path: what must exist where the value points. limits: pydantic's ge, gt, le, lt.
    required, positional: for the options of one command; a positional argument is given without its name.
    repeatable: given again on a command line, the values of such an option are added to those before.
    """
    facts = OptionFacts(
        no_effect=no_effect,
        path=path,
        required=required,
        positional=positional,
        repeatable=repeatable,
    )
    return Field(default, description=help, json_schema_extra=cast(Any, {"facts": facts}), **limits)


def make_option(name: str, theme: str, info: FieldInfo) -> Option:
    """The option behind a field of a theme."""
    extra = cast(dict[str, Any], info.json_schema_extra)
    inner, metavar = unwrap_type(info.annotation, info.metadata)
    choices = tuple(str(choice) for choice in get_args(inner)) if get_origin(inner) is Literal else ()
    return Option(
        name=name,
        theme=theme,
        help=info.description or "",
        default=info.get_default(call_default_factory=True),
        arity=read_arity(inner),
        metavar=metavar or ("|".join(choices) if choices else METAVARS.get(inner, "")),
        choices=choices,
        secret=inner is SecretStr,
        facts=extra["facts"],
    )


def unwrap_type(annotation: Any, metadata: list[Any]) -> tuple[Any, str]:
    """The type without `| None` and Annotated, and the text of an Annotated type's Metavar, if any."""
    if get_origin(annotation) in (Union, types.UnionType):
        inner = [part for part in get_args(annotation) if part is not type(None)]
        if len(inner) == 1:
            return unwrap_type(inner[0], metadata)
    if get_origin(annotation) is Annotated:
        annotation, *annotations = get_args(annotation)
        metadata = [*metadata, *annotations]
    metavars = [item.text for item in metadata if isinstance(item, Metavar)]
    return annotation, metavars[0] if metavars else ""


def read_arity(inner: Any) -> Arity:
    """How many values an option of this type takes."""
    if inner is bool:
        return "flag"
    variadic = get_origin(inner) is tuple and Ellipsis in get_args(inner)
    return "many" if variadic or get_origin(inner) is dict else "one"


Arity = Literal["flag", "one", "many"]
METAVARS = {int: "N", float: "X", str: "TEXT", Path: "PATH", SecretStr: "TEXT"}


@dataclass(frozen=True)
class Metavar:
    """The placeholder of a type in help texts."""

    text: str


@dataclass(frozen=True, kw_only=True)
class OptionFacts:
    """The arguments of `option` beyond the type, the default and the help line."""

    no_effect: str = ""
    path: PathKind = ""
    required: bool = False
    positional: bool = False
    repeatable: bool = False


@dataclass(frozen=True, kw_only=True)
class Option:
    """One option as the command line, the help and the documents see it. `metavar`: the placeholder of its value."""

    name: str
    theme: str
    help: str
    default: Any
    arity: Arity
    metavar: str
    choices: tuple[str, ...]
    secret: bool
    facts: OptionFacts

    @property
    def flag(self) -> str:
        """The option on a command line; of a positional argument its placeholder."""
        return self.name.upper() if self.facts.positional else f"--{self.name}"


class Options(BaseModel):
    """A theme: a frozen group of options. Only texts of a command line are converted to other types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, validate_default=False)
