"""The house rules that no linter knows: who may import whom, what shared code may name, how long things may be."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from pages import page_maker

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "sfumato"
FILES = sorted(PACKAGE.rglob("*.py"))

# From the bottom up: a file may import from its own folder and from the rows above its own, never from its own row's
# other names or from below.
LAYERS = (
    ("errors",),
    ("common",),
    ("config",),
    ("data", "diffusion"),
    ("formats",),
    ("adapters", "families"),
    ("optim",),
    ("memory", "methods", "track"),
    ("sample",),
    ("loss",),
    ("plan",),
    ("training",),
    ("train",),
    ("tools", "demo"),
    ("cli",),
    ("compat",),
    ("__main__",),
)
RANK = {name: rank for rank, row in enumerate(LAYERS) for name in row}

NAMES_FAMILIES = {"families", "compat", "demo", "cli", "common"}  # common/names.py is old option names as data
# What the field named after a family though others use it: an option and two keys of adapter files.
OPTION_NAMES = {"flux_shift", "sd_model", "ss_sd_scripts_commit_hash"}
ALLOWED_FAMILY_NAMES = {("config/model.py", "flux"), ("config/model.py", "chroma")}  # the choices of --model_type
MAY_PRINT = {"cli", "plan", "demo", "tools"}
ALLOWED_GETATTR = {("data/find/headers.py", "getattr(os, 'O_BINARY', 0)")}  # for what only some systems' libraries have
LONGEST_FILE, LONGEST_FUNCTION, LONGEST_LAUNCHER = 450, 80, 3

TORCH_FREE = (
    "errors.py", "common/*.py", "config/*.py", "data/find/*.py", "data/captions.py", "data/buckets.py",
    "data/images.py", "data/prompt_weighting.py", "data/variants.py", "data/cache/references.py",
    "cli/dataset.py", "cli/main.py", "plan.py",
)  # fmt: skip
HEAVY = ("torch", "diffusers", "transformers", "accelerate")

IMPORT_NAMES = {  # where they differ
    "pillow": "PIL", "protobuf": "google", "huggingface-hub": "huggingface_hub", "pillow-jxl-plugin": "pillow_jxl",
}  # fmt: skip


def relative_name(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def layer_of(path: Path) -> str:
    """The row's name that a file belongs to: its folder below the package, or its own name."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def family_names() -> set[str]:
    """The modules that register a family."""
    modules = (path for path in (PACKAGE / "families").glob("[a-z]*.py"))
    return {path.stem for path in modules if "@FAMILIES.register(" in path.read_text(encoding="utf-8")}


@cache
def parsed_file(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imports(tree: ast.Module, package: str) -> Iterator[tuple[int, str]]:
    """(line, dotted module) of every import anywhere in the tree; relative ones are made whole."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            if node.args and isinstance(node.args[0], ast.Constant):
                yield node.lineno, str(node.args[0].value)


def imports_upwards(tree: ast.Module, *, layer: str, package: str = "sfumato") -> Iterator[str]:
    for line, module in imports(tree, package):
        root, _, rest = module.partition(".")
        other = rest.partition(".")[0]
        if root == "sfumato" and other != layer and RANK.get(other, -1) >= RANK.get(layer, len(LAYERS)):
            yield f"{line}: {layer} imports {module}"


def family_words(text: str, families: set[str]) -> set[str]:
    words = re.findall(r"[A-Z]?[a-z0-9]+|[A-Z0-9]+(?![a-z])", text)
    return {word.lower() for word in words} & families


def names_a_family(tree: ast.Module, *, families: set[str], allowed: set[str]) -> Iterator[str]:
    """Identifiers and string literals with a family's name as a word; docstrings may cite papers."""
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        for text in identifiers(node) if not isinstance(node, ast.Constant) else [node.value]:
            if isinstance(text, str) and id(node) not in docstrings and text not in allowed:
                for family in family_words(text, families):
                    yield f"{getattr(node, 'lineno', 0)}: {text!r} names {family}"


def identifiers(node: ast.AST) -> list[str | None]:
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name) | ast.keyword(arg=name):
            return [name]
        case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
            return [name]
        case ast.Import(names=aliases):
            return [text for alias in aliases for text in (alias.name, alias.asname)]
        case ast.ImportFrom(module=module, names=aliases):
            return [module, *(text for alias in aliases for text in (alias.name, alias.asname))]
        case _:
            return []


def long_functions(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > LONGEST_FUNCTION:
                yield f"{node.lineno}: {node.name} has {length} lines"


def broad_excepts(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            for kind in caught:
                if kind is None or ast.unparse(kind).split(".")[-1] in ("Exception", "BaseException"):
                    yield f"{node.lineno}: catches everything"


def prints(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            yield f"{node.lineno}: print()"


def stubs(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id == "NotImplementedError":
            yield f"{node.lineno}: NotImplementedError"


def getattr_with_default(tree: ast.Module, *, allowed: set[str]) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
            if len(node.args) == 3 and ast.unparse(node) not in allowed:
                yield f"{node.lineno}: {ast.unparse(node)}"


def leftovers(text: str) -> Iterator[str]:
    for number, line in enumerate(text.splitlines(), 1):
        if re.search(r"\b(TODO|FIXME|XXX)\b", line):
            yield f"{number}: {line.strip()}"


def code_lines(text: str) -> int:
    """Lines that are neither blank, comment nor the file's docstring."""
    body = ast.parse(text).body
    told = {line for node in body[:1] if ast.get_docstring(ast.parse(text)) for line in _span(node)}
    lines = enumerate(text.splitlines(), 1)
    return sum(1 for number, line in lines if line.strip() and not line.lstrip().startswith("#") and number not in told)


def _span(node: ast.stmt) -> range:
    return range(node.lineno, (node.end_lineno or node.lineno) + 1)


def everywhere(rule: Callable[[Path], Iterator[str]], *, unless: frozenset[str] = frozenset()) -> list[str]:
    """What a rule finds in the package's files, each with its place."""
    return [f"{relative_name(path)}:{fault}" for path in FILES if layer_of(path) not in unless for fault in rule(path)]


def test_every_file_has_a_place_in_the_layers():
    unknown = {layer_of(path) for path in FILES} - set(RANK) - {"__init__"}
    assert not unknown, f"not in LAYERS: {sorted(unknown)}"
    assert not {relative_name(path.parent) for path in FILES if not (path.parent / "__init__.py").is_file()}


def test_imports_point_one_way():
    def rule(path: Path) -> Iterator[str]:
        package = ".".join(path.relative_to(PACKAGE.parent).parts[:-1])
        return imports_upwards(parsed_file(path), layer=layer_of(path), package=package)

    assert not everywhere(rule, unless=frozenset({"__init__"}))


def test_the_package_itself_imports_nothing():
    assert not list(imports(parsed_file(PACKAGE / "__init__.py"), "sfumato"))


def test_shared_code_names_no_family():
    families = family_names()
    assert families, "no family was found: has the folder moved?"

    def rule(path: Path) -> Iterator[str]:
        allowed = OPTION_NAMES | {text for file, text in ALLOWED_FAMILY_NAMES if file == relative_name(path)}
        return names_a_family(parsed_file(path), families=families, allowed=allowed)

    assert not everywhere(rule, unless=frozenset(NAMES_FAMILIES))


def test_files_and_functions_stay_short():
    long = [
        f"{relative_name(path)}: {n} lines"
        for path in FILES
        if (n := len(path.read_text().splitlines())) > LONGEST_FILE
    ]
    assert not long
    assert not everywhere(lambda path: long_functions(parsed_file(path)))


def test_no_broad_except():
    assert not everywhere(lambda path: broad_excepts(parsed_file(path)))


def test_library_code_does_not_print():
    assert not everywhere(lambda path: prints(parsed_file(path)), unless=frozenset(MAY_PRINT))


def test_nothing_is_left_unfinished():
    assert not everywhere(lambda path: stubs(parsed_file(path)))
    assert not everywhere(lambda path: leftovers(path.read_text(encoding="utf-8")))


def test_no_getattr_with_a_default():
    def rule(path: Path) -> Iterator[str]:
        allowed = {call for file, call in ALLOWED_GETATTR if file == relative_name(path)}
        return getattr_with_default(parsed_file(path), allowed=allowed)

    assert not everywhere(rule)


def test_the_first_line_says_what_the_file_is():
    silent = [
        relative_name(p) for p in FILES if not ast.get_docstring(parsed_file(p)) or parsed_file(p).body[0].lineno != 1
    ]
    assert not silent


def test_launchers_hold_no_logic():
    launchers = sorted((ROOT / "launchers").rglob("*.py"))
    counted = {path.relative_to(ROOT).as_posix(): code_lines(path.read_text(encoding="utf-8")) for path in launchers}
    assert not {path: lines for path, lines in counted.items() if lines > LONGEST_LAUNCHER}


def test_what_is_imported_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [line for name, lines in project["optional-dependencies"].items() if name != "test" for line in lines]
    wanted = {re.split(r"[<>=!~;\[ ]", line)[0].lower() for line in [*project["dependencies"], *extras]}
    known = {IMPORT_NAMES.get(name, name.replace("-", "_")) for name in wanted} | {"sfumato"} | sys.stdlib_module_names

    def rule(path: Path) -> Iterator[str]:
        for line, module in imports(parsed_file(path), "sfumato"):
            if module.partition(".")[0] not in known:
                yield f"{line}: {module} is not a dependency in pyproject.toml"

    assert not everywhere(rule)


def test_what_must_start_fast_does_not_import_torch():
    paths = [path for pattern in TORCH_FREE for path in sorted(PACKAGE.glob(pattern))]
    modules = [".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in paths]
    program = f"""
import importlib, sys
for module in {[module.removesuffix(".__init__") for module in modules]!r}:
    importlib.import_module(module)
    heavy = [name for name in {HEAVY!r} if name in sys.modules]
    if heavy:
        sys.exit(f"{{module}} imports {{heavy}}")
"""
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_readme_maps_every_file():
    maker = page_maker("make_file_map")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert maker.with_map(readme) == readme, "README's file map is out of date: run `make pages`"
    mapped = re.findall(r"^\| `([\w/]+\.py)` \|", readme, flags=re.MULTILINE)
    assert sorted(mapped) == sorted(relative_name(path) for path in FILES if path.name != "__init__.py")


@pytest.mark.parametrize(
    ("layer", "code", "faults"),
    [
        ("data", "from sfumato.errors import UserError", 0),
        ("data", "from sfumato.diffusion import noise", 1),
        ("data", "def f():\n    import sfumato.formats.keymap", 1),
        ("methods", "from sfumato.families.base import Family", 0),
        ("families", "if TYPE_CHECKING:\n    from sfumato.methods import base", 1),
        ("families", "from sfumato import train", 1),
        ("families", "from .base import Family", 0),
        ("families", "from ..methods import base", 1),
        ("families", "importlib.import_module('sfumato.train')", 1),
        ("errors", "from sfumato.common import seeds", 1),
        ("common", "from sfumato import errors", 0),
    ],
)
def test_the_import_rule_catches(layer, code, faults):
    assert len(list(imports_upwards(ast.parse(code), layer=layer, package=f"sfumato.{layer}"))) == faults


@pytest.mark.parametrize(
    ("code", "faults"),
    [
        ('"""As in the toyxl paper."""', 0),
        ('name = "toyxl"', 1),
        ("def load_toyxl(): pass", 1),
        ("class ToyxlThing: pass", 1),
        ('f(f"{x} is TOYXL")', 1),
        ('f("toyxlish")', 0),
        ('f("toyxl_shift")', 0),
        ("f(toyxl=1)", 1),
        ("from a import b as toyxl", 1),
    ],
)
def test_the_family_rule_catches(code, faults):
    found = list(names_a_family(ast.parse(code), families={"toyxl"}, allowed={"toyxl_shift"}))
    assert len(found) == faults, found


@pytest.mark.parametrize(
    ("rule", "bad", "good"),
    [
        (broad_excepts, "try: f()\nexcept: pass", "try: f()\nexcept OSError: pass"),
        (broad_excepts, "try: f()\nexcept (OSError, Exception): pass", "try: f()\nfinally: g()"),
        (prints, "print(1)", "console.print(1)"),
        (stubs, "raise NotImplementedError", "raise ValueError"),
        (stubs, "raise NotImplementedError('later')", "x = 'NotImplementedError'"),
        (long_functions, "def f():\n" + " x = 1\n" * 80, "def f():\n" + " x = 1\n" * 79),
    ],
)
def test_the_other_rules_catch(rule, bad, good):
    assert list(rule(ast.parse(bad)))
    assert not list(rule(ast.parse(good)))


def test_the_getattr_rule_catches():
    code = ast.parse("getattr(x, 'a')\ngetattr(x, 'a', None)\ngetattr(os, 'b', 1)")
    assert list(getattr_with_default(code, allowed={"getattr(os, 'b', 1)"})) == ["2: getattr(x, 'a', None)"]


def test_lines_of_code_are_counted_without_docstring_and_comments():
    assert code_lines('"""One.\n\nTwo.\n"""\n\n# three\nimport sys\n\nsys.exit(0)\n') == 2
    assert code_lines("x = 1\n") == 1
