"""What an option is: a typed field with a help line, and the facts that shared code asks of it."""

from __future__ import annotations

import types
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, SecretStr
from pydantic.fields import FieldInfo

PathKind = Literal["", "file", "folder", "model"]  # "model": a file, a folder, or a name on the hub


def option(
    default: Any,
    help: str,
    *,
    planned: str = "",
    no_effect: str = "",
    path: PathKind = "",
    **limits: Any,
) -> Any:
    """One option of the vocabulary: a pydantic field whose name is the option's name.

    planned: the room that will bring it; until then any value but the default is refused.
        Delete the argument to open the option.
    no_effect: why setting it changes nothing here; it is accepted and reported.
    path: what must exist where the value points. limits: pydantic's ge, gt, le, lt.
    """
    facts = Facts(planned=planned, no_effect=no_effect, path=path)
    return Field(default, description=help, json_schema_extra=cast(Any, {"facts": facts}), **limits)


def described(name: str, theme: str, info: FieldInfo) -> Option:
    """The option behind a field of a theme."""
    extra = cast(dict[str, Any], info.json_schema_extra)
    inner, shown = unwrapped(info.annotation, info.metadata)
    choices = tuple(str(choice) for choice in get_args(inner)) if get_origin(inner) is Literal else ()
    return Option(
        name=name,
        theme=theme,
        help=info.description or "",
        default=info.get_default(call_default_factory=True),
        kind=kind_of(inner),
        takes=shown or ("|".join(choices) if choices else PLACEHOLDERS.get(inner, "")),
        choices=choices,
        secret=inner is SecretStr,
        facts=extra["facts"],
    )


def unwrapped(annotation: Any, metadata: list[Any]) -> tuple[Any, str]:
    """The type without `| None` and Annotated, and the placeholder that an Annotated type brought along."""
    if get_origin(annotation) in (Union, types.UnionType):
        inner = [part for part in get_args(annotation) if part is not type(None)]
        if len(inner) == 1:
            return unwrapped(inner[0], metadata)
    if get_origin(annotation) is Annotated:
        annotation, *found = get_args(annotation)
        metadata = [*metadata, *found]
    shown = [item.text for item in metadata if isinstance(item, Shown)]
    return annotation, shown[0] if shown else ""


def kind_of(inner: Any) -> Kind:
    if inner is bool:
        return "flag"
    variadic = get_origin(inner) is tuple and Ellipsis in get_args(inner)
    return "many" if variadic or get_origin(inner) is dict else "one"


Kind = Literal["flag", "one", "many"]
PLACEHOLDERS = {int: "N", float: "X", str: "TEXT", Path: "PATH", SecretStr: "TEXT"}


@dataclass(frozen=True)
class Shown:
    """The placeholder of a type in help texts."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What `option` was told beyond the type, the default and the help line."""

    planned: str = ""
    no_effect: str = ""
    path: PathKind = ""


@dataclass(frozen=True, kw_only=True)
class Option:
    """One word of the vocabulary, as the command line, help and documents see it."""

    name: str
    theme: str
    help: str
    default: Any
    kind: Kind
    takes: str
    choices: tuple[str, ...]
    secret: bool
    facts: Facts

    @property
    def flag(self) -> str:
        return f"--{self.name}"

    def room(self, value: Any) -> str:
        """The room that will bring this value; empty where it is available now."""
        return "" if value == self.default else self.facts.planned


class Options(BaseModel):
    """A theme: a frozen group of options. Texts become other types only where they come from a command line."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, validate_default=False)
