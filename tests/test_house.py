"""The house rules that no linter knows: who may import whom, what shared code may name, how long things may be."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from house_rules import (
    ALLOWED_FAMILY_NAMES,
    ALLOWED_GETATTR,
    ALLOWED_KIND_NAMES,
    FILES,
    HEAVY,
    IMPORT_NAMES,
    LONGEST_FILE,
    LONGEST_LAUNCHER,
    LONGEST_TEST_FILE,
    MAY_CATCH_ALL,
    MAY_PRINT,
    MOST_IMPORTS,
    NAMES_FAMILIES,
    NAMES_KINDS,
    OPTION_NAMES,
    PACKAGE,
    RANK,
    READING_LIST,
    ROOT,
    SHARED_NAMES,
    TOP_LEVEL,
    TORCH_FREE,
    broad_excepts,
    code_lines,
    everywhere,
    family_names,
    getattr_with_default,
    imports,
    imports_upwards,
    is_protocol,
    kind_names,
    layer_of,
    leftovers,
    long_functions,
    names_a_family,
    names_a_kind,
    own_modules,
    parsed_file,
    prints,
    public_names,
    relative_name,
    stubs,
    talks_to_processes,
)
from pages import page_maker


def test_every_file_has_a_place_in_the_layers():
    unknown = {layer_of(path) for path in FILES} - set(RANK) - {"__init__"}
    assert not unknown, f"not in LAYERS: {sorted(unknown)}"
    assert not {relative_name(path.parent) for path in FILES if not (path.parent / "__init__.py").is_file()}


def test_imports_point_one_way():
    def rule(path: Path) -> Iterator[str]:
        package = ".".join(path.relative_to(PACKAGE.parent).parts[:-1])
        return imports_upwards(parsed_file(path), layer=layer_of(path), package=package)

    assert not everywhere(rule, unless=frozenset({"__init__"}))


def test_the_parallel_strategy_alone_talks_to_processes():
    assert not everywhere(lambda path: talks_to_processes(parsed_file(path)), unless=frozenset({"parallel"}))


def test_the_package_itself_imports_nothing():
    assert not list(imports(parsed_file(PACKAGE / "__init__.py"), "sfumato"))


def test_shared_code_names_no_family():
    families = family_names()
    assert families, "no family was found: has the folder moved?"

    def rule(path: Path) -> Iterator[str]:
        allowed = OPTION_NAMES | {text for file, text in ALLOWED_FAMILY_NAMES if file == relative_name(path)}
        return names_a_family(parsed_file(path), families=families, allowed=allowed)

    assert not everywhere(rule, unless=frozenset(NAMES_FAMILIES))


def test_shared_code_names_no_kind_of_adapter():
    kinds = kind_names()
    assert {"lora", "lokr", "dora"} <= kinds, "no kind was found: has the folder moved?"

    def rule(path: Path) -> Iterator[str]:
        allowed = ALLOWED_KIND_NAMES.get(relative_name(path), "")
        return names_a_kind(parsed_file(path), kinds=kinds, allowed=allowed)

    assert not everywhere(rule, unless=frozenset(NAMES_KINDS))


def test_files_and_functions_stay_short():
    long = [
        f"{relative_name(path)}: {n} lines"
        for path in FILES
        if (n := len(path.read_text().splitlines())) > LONGEST_FILE
    ]
    assert not long
    assert not everywhere(lambda path: long_functions(parsed_file(path)))


def test_the_top_level_is_five_modules():
    assert {path.stem for path in PACKAGE.glob("[a-z]*.py")} == TOP_LEVEL


def test_no_module_imports_more_than_fifteen_of_ours():
    counts: dict[str, int] = {}
    for path in FILES:
        counts[relative_name(path)] = len(own_modules(parsed_file(path)))
    assert not {name: count for name, count in counts.items() if count > MOST_IMPORTS}


def test_no_public_name_is_defined_twice():
    homes: dict[str, list[str]] = {}
    for path in FILES:
        for name in public_names(parsed_file(path)):
            homes.setdefault(name, []).append(relative_name(path))
    twice = {name: files for name, files in homes.items() if len(files) > 1 and name not in SHARED_NAMES}
    assert not {name: files for name, files in twice.items() if not is_protocol(name, files)}


def test_the_reading_list_is_short():
    lengths = {name: len((ROOT / name).read_text(encoding="utf-8").splitlines()) for name in READING_LIST}
    assert sum(lengths.values()) < 1200, lengths


def test_test_files_stay_short():
    lengths: dict[str, int] = {}
    for path in sorted((ROOT / "tests").rglob("*.py")):
        lengths[path.relative_to(ROOT).as_posix()] = len(path.read_text(encoding="utf-8").splitlines())
    assert not {name: length for name, length in lengths.items() if length > LONGEST_TEST_FILE}


def test_no_broad_except():
    def rule(path: Path) -> Iterator[str]:
        allowed = {name for file, name in MAY_CATCH_ALL if file == relative_name(path)}
        return broad_excepts(parsed_file(path), allowed=allowed)

    assert not everywhere(rule)


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
    known = (
        {IMPORT_NAMES.get(name, name.replace("-", "_")) for name in wanted}
        | {"sfumato", "pydantic_core"}
        | sys.stdlib_module_names
    )

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


def test_the_file_map_lists_every_file():
    maker = page_maker("make_file_map")
    page = maker.PAGE.read_text(encoding="utf-8")
    assert page == maker.page(), "docs/files.md is out of date: run `make pages`"
    listed = re.findall(r"^\| `([\w/]+\.py)` \|", page, flags=re.MULTILINE)
    assert sorted(listed) == sorted(relative_name(path) for path in FILES if path.name != "__init__.py")


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
    ("code", "faults"),
    [("x = 'LoKr'", 1), ("lokr_w1 = 1", 1), ("f('lokred')", 0), ("x = c.frozen_lokr", 1), ("f('LoKr+')", 0)],
)
def test_the_kind_rule_catches(code, faults):
    assert len(list(names_a_kind(ast.parse(code), kinds={"lokr"}, allowed=""))) == faults


@pytest.mark.parametrize(
    ("rule", "bad", "good"),
    [
        (broad_excepts, "try: f()\nexcept: pass", "try: f()\nexcept OSError: pass"),
        (broad_excepts, "try: f()\nexcept (OSError, Exception): pass", "try: f()\nfinally: g()"),
        (prints, "print(1)", "console.print(1)"),
        (stubs, "raise NotImplementedError", "raise ValueError"),
        (stubs, "raise NotImplementedError('later')", "x = 'NotImplementedError'"),
        (talks_to_processes, "import torch.distributed as d", "import torch"),
        (talks_to_processes, "from torch import distributed", "from torch import Tensor"),
        (talks_to_processes, "torch.distributed.barrier()", "run.parallel.exchange()"),
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
