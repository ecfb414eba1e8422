"""Every command of README and manual runs, on toys; pages in several languages say the same."""

from __future__ import annotations

import re
import shutil
from functools import cache
from pathlib import Path

import pytest

from docs.commands import BLOCK, NOT_RUN, ROOT, SHELLS, SMALL, find_reason, list_pieces, read_command
from docs.home import make_home
from families.toys import ToyShelf
from pages import page_maker
from sfumato.cli.completion import list_entries
from sfumato.cli.generate import ALIASES as GENERATE_ALIASES
from sfumato.cli.main import main as sfumato
from sfumato.common.names import OPTION_ALIASES
from sfumato.compat.launch import main as run_script
from sfumato.config.prompt_options import LINE_OPTIONS
from sfumato.config.schema import vocabulary

PAGES = sorted([*ROOT.glob("README*.md"), ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
GENERATED = ("errors.md", "files.md", "options.md")
TRANSLATED = (  # page -> its translations
    ("README.md", ("README-zh.md", "README-ja.md")),
    ("docs/config_README-en.md", ("docs/config_README-ja.md",)),
    ("docs/masked_loss_README.md", ("docs/masked_loss_README-ja.md",)),
    ("docs/train_lllite_README.md", ("docs/train_lllite_README-ja.md",)),
    ("docs/wd14_tagger_README-en.md", ("docs/wd14_tagger_README-ja.md",)),
)
LINKED = (  # pages that people link to
    "train_network", "sdxl_train_network", "sdxl_train_network_advanced", "train_network_advanced",
    "flux_train_network", "sd3_train_network", "lumina_train_network", "config_README-en", "config_README-ja",
    "train_lllite_README", "train_lllite_README-ja", "masked_loss_README", "masked_loss_README-ja",
    "wd14_tagger_README-en", "wd14_tagger_README-ja", "gen_img_README", "validation", "fine_tune",
    "train_textual_inversion",
)  # fmt: skip
EXAMPLES = sorted(path.stem for path in (ROOT / "examples" / "train").glob("*.toml") if path.stem != "dataset")
ELSEWHERE = {  # options of torchrun, accelerate and of our scripts that measure
    "help", "nproc_per_node", "nnodes", "node_rank", "rdzv_endpoint", "num_processes", "only", "page", "reference",
    "kinds", "models",
}  # fmt: skip
CODE = re.compile(r"`([^`\n]+)`")


def has_commands(page: Path) -> bool:
    return page.name not in GENERATED and any(
        piece.words and not find_reason(piece.text) for piece in list_pieces(page)
    )


@pytest.fixture(scope="session")
def full_home(toy_shelf: ToyShelf, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_home(toy_shelf, tmp_path_factory.mktemp("manual"), shrink_file)


@pytest.mark.full
@pytest.mark.parametrize("page", [*filter(has_commands, PAGES)], ids=lambda page: page.name)
def test_every_command_of_a_page_runs(
    page: Path, full_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    shutil.copytree(full_home, home, symlinks=True)
    monkeypatch.chdir(home)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for piece in list_pieces(page):
        if piece.file:
            path = home / piece.file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(shrink_file(piece.text), encoding="utf-8")
        elif piece.words and not find_reason(piece.text):
            script, arguments = read_command(piece.words)
            code = run_script([script, *arguments]) if script else sfumato(arguments)
            assert code == 0, piece.text


def test_what_does_not_run_here_runs_elsewhere() -> None:
    named = {reason for reason in NOT_RUN.values() if reason.startswith("tests/")}
    assert not [reason for reason in named if not (ROOT / reason).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_is_in_a_block_that_runs(page: Path) -> None:
    text = BLOCK.sub(lambda block: "" if block[2] in SHELLS else block[0], page.read_text(encoding="utf-8"))
    assert not re.findall(r"^ *(?:sfumato|torchrun|accelerate launch|python) .*--\w.*$", text, flags=re.MULTILINE)


@pytest.mark.full
@pytest.mark.parametrize("name", EXAMPLES)
def test_every_example_trains(name: str, full_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(full_home)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    words = ["train", "--config_file", f"examples/train/{name}.toml", *SMALL, "--output_dir", str(tmp_path / "out")]
    assert sfumato(words) == 0
    assert list((tmp_path / "out").glob("*.safetensors"))


def shrink_file(text: str) -> str:
    """A dataset or configuration with images of 128 pixels."""
    small = r"\1resolution = 128"
    if "[[datasets]]" in text:
        small += r"\n\1min_bucket_reso = 64\n\1max_bucket_reso = 256"
    return re.sub(r"^( *)resolution\s*=.*$", small, text, flags=re.MULTILINE)


def test_requirements_are_those_of_the_project() -> None:
    assert (ROOT / "requirements.txt").read_text(encoding="utf-8") == page_maker(
        "make_requirements"
    ).make_requirements()


def test_pages_that_people_link_to_are_there() -> None:
    assert not [name for name in LINKED if not (ROOT / "docs" / f"{name}.md").is_file()]


@pytest.mark.parametrize(
    ("page", "translations"), TRANSLATED, ids=lambda value: value if isinstance(value, str) else ""
)
def test_translations_name_the_same_commands_and_options(page: str, translations: tuple[str, ...]) -> None:
    expected = facts_of(ROOT / page)
    for translation in translations:
        found = facts_of(ROOT / translation)
        assert found == expected, sorted(found ^ expected)


def facts_of(page: Path) -> set[str]:
    """Its commands, files and the words in its code that are options, keys or commands."""
    blocks = {" ".join(piece.words) or f"{piece.file}: {strip_comments(piece.text)}" for piece in list_pieces(page)}
    words = set(CODE.findall(page.read_text(encoding="utf-8")))
    return blocks | {word for word in words if word.startswith(("--", "sfumato ")) or word in vocabulary()}


def strip_comments(text: str) -> str:
    return re.sub(r"\s*#.*$", "", text, flags=re.MULTILINE).strip()


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in GENERATED], ids=lambda page: page.name)
def test_options_that_a_page_names_exist(page: Path) -> None:
    """In running text; commands say it themselves."""
    text = re.sub(r"^( *)```.*?^\1```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    named = {match for code in CODE.findall(text) for match in re.findall(r"(?<![\w-])--(\w+)", code)}
    unknown = {name for name in named if name not in known_options()}
    assert not unknown


@cache
def known_options() -> set[str]:
    """Of every command, of lines of prompts, and of the programs that start ours."""
    names = {flag.name for entry in list_entries() for flag in entry.flags} | set(vocabulary()) | set(OPTION_ALIASES)
    names |= set(LINE_OPTIONS) | set(GENERATE_ALIASES) | ELSEWHERE
    return names | {f"no_{name}" for name in names}
