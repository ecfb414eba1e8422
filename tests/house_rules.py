"""The rules that test_house.py holds the package to, as functions over syntax trees, and their reviewed exceptions."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Collection, Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "sfumato"
FILES = sorted(PACKAGE.rglob("*.py"))

# From the bottom up: a file may import from its own folder and from the rows above its own, never from its own row's
# other names or from below.
LAYERS = (
    ("errors",),
    ("common",),
    ("config",),
    ("data", "diffusion", "quantization"),
    ("formats",),
    ("adapters", "families"),
    ("optim",),
    ("memory", "methods", "parallel", "track"),
    ("sampling",),
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

TOP_LEVEL = {"train", "loss", "sample", "plan", "errors"}
MOST_IMPORTS = 15
READING_LIST = (
    "README.md", "src/sfumato/train.py", "src/sfumato/families/base.py", "src/sfumato/families/sdxl.py",
    "src/sfumato/methods/adapter.py", "src/sfumato/adapters/lora.py",
)  # fmt: skip
LONGEST_TEST_FILE = 400
# What several modules may define under one name: each module's logger, and implementations of one protocol.
SHARED_NAMES = {"log"}
PROTOCOLS = (  # files -> names that each of them may define
    (
        r"families/_\w+\.py",
        {
            "build", "config_from_shapes", "read_config", "key_map", "spec",
            "TARGETS", "BLOCKS", "tokenize", "encode_tokens", "apply_prompt_weights",
        },
    ),
    (r"demo/toy_\w+\.py", {"write", "write_folder", "make_networks", "single_file", "single_files"}),
    (r"adapters/\w+\.py", {"SPELLINGS"}),
    (r"cli/\w+\.py|compat/(launch|import_run)\.py", {"main"}),
    (r"cli/\w+\.py", {"run"}),
)  # fmt: skip

NAMES_FAMILIES = {"families", "compat", "demo", "cli", "common"}  # common/names.py is old option names as data
# What the field named after a family though others use it: an option and two keys of adapter files.
OPTION_NAMES = {"flux_shift", "sd_model", "ss_sd_scripts_commit_hash"}
ALLOWED_FAMILY_NAMES = {("config/model.py", name) for name in ("flux", "flux_kontext", "chroma")}  # --model_type
ALLOWED_FAMILY_NAMES |= {("training/comfyui_workflow.py", "EmptySD3LatentImage")}  # a node of ComfyUI
NAMES_KINDS = {"adapters", "families", "compat", "demo", "cli", "common", "config"}  # classes, names in files, options
ALLOWED_KIND_NAMES = {  # file -> what it may say: others' keys, arguments and file names, an option, a command
    "formats/adapter_keys.py": r".*", "formats/peft_config.py": r".*", "tools/export_lora.py": r".*",
    "formats/adapter_file.py": r"pytorch_lora_weights\..*|lora_", "formats/adapter_layers.py": r".*lora_te2_",
    "tools/adapter_files/resize.py": r"sfumato lora .*",
    "methods/adapter.py": r"/lora", "methods/adapter_modules.py": r"rs_lora",
}  # fmt: skip
FROZEN_OPTION = re.compile(r"frozen_lora")
MAY_CATCH_ALL = {
    ("families/_tokenizers.py", "catch_tokenizer_faults"),  # a library that raises plain Exceptions
    ("track/guard.py", "survive"),  # no report, preview or tracker, nor their libraries, may end a run
}
MAY_PRINT = {"cli", "plan", "demo", "tools"}
ALLOWED_GETATTR = {("data/find/headers.py", "getattr(os, 'O_BINARY', 0)")}  # for what only some systems' libraries have
LONGEST_FILE, LONGEST_FUNCTION, LONGEST_LAUNCHER = 450, 80, 3

TORCH_FREE = (
    "errors.py", "common/*.py", "config/*.py", "data/find/*.py", "data/captions.py", "data/buckets.py",
    "data/images.py", "data/prompt_weighting.py", "data/variants.py", "data/cache/references.py",
    "cli/*.py", "plan.py", "training/plan_report.py", "tools/plan.py",
)  # fmt: skip
HEAVY = ("torch", "diffusers", "transformers", "accelerate")

IMPORT_NAMES = {  # where they differ
    "pillow": "PIL", "pyyaml": "yaml",
    "protobuf": "google", "huggingface-hub": "huggingface_hub", "pillow-jxl-plugin": "pillow_jxl",
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
        elif isinstance(node, ast.Call) and last_name(node.func) == "import_module":
            if node.args and isinstance(node.args[0], ast.Constant):
                yield node.lineno, str(node.args[0].value)


def last_name(node: ast.AST) -> str:
    """b of a.b, and of b; unlike `ast.unparse`, at no cost."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


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


def kind_names() -> set[str]:
    """The names of the registered kinds of adapters."""
    files = (path.read_text(encoding="utf-8") for path in (PACKAGE / "adapters").glob("*.py"))
    return {name for text in files for name in re.findall(r'@ADAPTERS\.register\("(\w+)"', text)}


def names_a_kind(tree: ast.Module, *, kinds: set[str], allowed: str) -> Iterator[str]:
    """Identifiers and string literals with the name of a kind of adapter as a word of letters; not docstrings."""
    word = re.compile(rf"(?<![a-z])({'|'.join(sorted(kinds))})(?![a-z+])", re.IGNORECASE)
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        for text in identifiers(node) if not isinstance(node, ast.Constant) else [node.value]:
            if isinstance(text, str) and id(node) not in docstrings and word.search(FROZEN_OPTION.sub("", text)):
                if not re.fullmatch(allowed, text):
                    yield f"{getattr(node, 'lineno', 0)}: {text!r} names a kind of adapter"


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


def broad_excepts(tree: ast.Module, *, allowed: Collection[str] = ()) -> Iterator[str]:
    """allowed: names of functions that may catch everything."""
    reviewed: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name in allowed:
            reviewed.update(ast.walk(node))
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler) and node not in reviewed:
            caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            for kind in caught:
                if kind is None or ast.unparse(kind).split(".")[-1] in ("Exception", "BaseException"):
                    yield f"{node.lineno}: catches everything"


def prints(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
            yield f"{node.lineno}: print()"


def talks_to_processes(tree: ast.Module) -> Iterator[str]:
    """Imports and uses of torch.distributed, by whatever name, and of accelerate's state of processes."""
    for line, module in imports(tree, "sfumato"):
        if module.startswith("torch.distributed") or module in ("accelerate.PartialState", "accelerate.Accelerator"):
            yield f"{line}: imports {module}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr == "distributed" and ast.unparse(node) == "torch.distributed":
            yield f"{node.lineno}: uses torch.distributed"


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


def own_modules(tree: ast.Module) -> set[str]:
    """The modules of the package that a file imports, in functions too."""
    modules: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "sfumato":
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                modules.add(inner if is_module(inner) else str(node.module))
        elif isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names if alias.name.partition(".")[0] == "sfumato"}
    return modules


def is_module(dotted: str) -> bool:
    path = PACKAGE.parent.joinpath(*dotted.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def public_names(tree: ast.Module) -> Iterator[str]:
    """Functions, classes and constants that a module defines at its top level."""
    for node in tree.body:
        names: list[str] = []
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names = [node.name]
        elif isinstance(node, ast.Assign):
            names = [target.id for target in node.targets if isinstance(target, ast.Name)]
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names = [node.target.id]
        yield from (name for name in names if not name.startswith("_"))


def is_protocol(name: str, files: list[str]) -> bool:
    """Whether all homes of a name implement one protocol, whose names they have in common."""
    return any(name in names and all(re.match(pattern, file) for file in files) for pattern, names in PROTOCOLS)


def everywhere(rule: Callable[[Path], Iterator[str]], *, unless: frozenset[str] = frozenset()) -> list[str]:
    """What a rule finds in the package's files, each with its place."""
    return [f"{relative_name(path)}:{fault}" for path in FILES if layer_of(path) not in unless for fault in rule(path)]
