"""The words of docs/glossary.md, held to the code: names that were retired, functions named by participles, phrases."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from house_rules import FILES, parsed_file, relative_name
from pages import page_maker

GLOSSARY = Path(__file__).parents[1] / "docs" / "glossary.md"
ALLOWED_NAMES = frozenset(  # (file, name): the name of an option
    (f"cli/lora_{command}.py", "without") for command in ("convert", "merge")
)
PARTICIPLES = {"told", "shown", "made", "held", "kept", "found", "drawn", "taken", "begun", "left", "given"}
NO_PARTICIPLES = {"need", "seed", "feed", "embed"}
ALLOWED_FUNCTIONS = frozenset(  # (file, name): the context manager that the glossary itself names
    (f"methods/{module}.py", "disabled")
    for module in ("adapter", "base", "control_net", "full", "inference_adapters", "lllite", "textual_inversion")
) | {("loss.py", "disabled")}
PHRASES = {  # what occurs in no message or help line -> what to say instead
    r"\bpictures?\b": "image, or sample for a generated one",
    r"\bthe field('s)?\b": "sd-scripts or kohya format",
    r", as \S": "e.g.",
    r"\bwithout it\b": "default",
    r"\b(leave|leaves|left|leaving)\b.{0,40}\bout\b": "skip, remove",
    r"\btold\b|\btells?\b": "report",
    r"\bmend(s|ed)?\b": "fix",
    r"\bgoes before\b": "takes precedence",
    r"\bavailable yet\b": "not implemented yet",
    r"\bcolour": "color",
    r"float32 neither": "even in float32",
    r"\bwalk(ed|s)?\b": "use, support",
    r"\bwhence\b|\banew\b": "plain words",
    r"(?<!earning )(?<!earning-)(?<!dropout )\brates?\b": "learning rate",
}
ALLOWED_PHRASES = frozenset({"a picture of"})  # whole messages: reviewed. The words that BLIP was trained on


def retired_words() -> frozenset[str]:
    """The left column of the glossary's table of names."""
    table = GLOSSARY.read_text(encoding="utf-8").partition("## Names")[2].partition("## ")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    return frozenset(word for row in rows for word in re.findall(r"`(\w+)`", row))


RETIRED = retired_words()


def definitions(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, name) of every class, function, method, constant and field; not of locals and parameters."""
    bodies: list[ast.Module | ast.ClassDef] = [tree]
    bodies += [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, node.name
    for body in bodies:
        for node in body.body:
            targets = node.targets if isinstance(node, ast.Assign) else []
            targets += [node.target] if isinstance(node, ast.AnnAssign) else []
            yield from ((node.lineno, target.id) for target in targets if isinstance(target, ast.Name))
    for node in ast.walk(tree):  # fields that a method sets
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id == "self":
                yield node.lineno, node.attr


def retired_names(tree: ast.Module, file: str) -> Iterator[str]:
    stem = Path(file).stem
    if stem in RETIRED:
        yield f"{file}: the module's name is retired"
    for line, name in definitions(tree):
        if name.lstrip("_") in RETIRED and (file, name) not in ALLOWED_NAMES:
            yield f"{file}:{line}: {name} is retired"


def participles(tree: ast.Module, file: str) -> Iterator[str]:
    """Functions and methods that are called by a participle alone or by of_x; properties read as attributes."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or (file, node.name) in ALLOWED_FUNCTIONS:
            continue
        if any("property" in ast.unparse(decorator) for decorator in node.decorator_list):
            continue
        name = node.name.lstrip("_")
        bare = re.fullmatch(r"[a-z]+ed", name) and name not in NO_PARTICIPLES
        if bare or name in PARTICIPLES or name.startswith("of_") or name == "of":
            yield f"{file}:{node.lineno}: the function {node.name} is no verb"


def phrases(text: str) -> Iterator[str]:
    for pattern, instead in PHRASES.items():
        if re.search(pattern, text) and text not in ALLOWED_PHRASES:
            yield f"{text!r}: {instead}"


def test_no_retired_name():
    assert not [fault for path in FILES for fault in retired_names(parsed_file(path), relative_name(path))]


def test_functions_are_verbs():
    assert not [fault for path in FILES for fault in participles(parsed_file(path), relative_name(path))]


def test_messages_use_the_words():
    maker = page_maker("make_messages")
    faults: list[str] = []
    for path in FILES:
        for text in maker.messages(parsed_file(path)):
            faults += [f"{relative_name(path)}: {fault}" for fault in phrases(text)]
    assert not faults


@pytest.mark.parametrize(
    ("code", "faults"),
    [
        ("class Job: pass", 1),
        ("class A:\n    kind: str = ''", 1),
        ("class A:\n    def __init__(self):\n        self.kind = 1", 1),
        ("def f(kind):\n    told = kind", 0),
        ("def _told(): pass", 1),
    ],
)
def test_the_rule_of_names_catches(code: str, faults: int):
    assert len(list(retired_names(ast.parse(code), "a.py"))) == faults


@pytest.mark.parametrize(
    ("code", "faults"),
    [
        ("def parsed(): pass", 1),
        ("def of_json(): pass", 1),
        ("def parse(): pass", 0),
        ("def make_seed(): pass", 0),
        ("class A:\n    @property\n    def guided(self): pass", 0),
    ],
)
def test_the_rule_of_functions_catches(code: str, faults: int):
    assert len(list(participles(ast.parse(code), "a.py"))) == faults


@pytest.mark.parametrize(
    ("text", "faults"),
    [
        ("the learning rate is 0", 0),
        ("the rate is 0", 1),
        ("give a number, as 3", 1),
        ("e.g. --steps 3", 0),
        ("the pictures of the field", 2),
        ("leave --shard out", 1),
    ],
)
def test_the_rule_of_phrases_catches(text: str, faults: int):
    assert len(list(phrases(text))) == faults
