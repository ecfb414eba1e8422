"""Writes docs/options.md: `python -m sfumato.compat.table > docs/options.md`."""

from __future__ import annotations

import sys

from sfumato.adapters.kinds import list_kinds
from sfumato.cli.generate import ALIASES
from sfumato.common.foreign_keys import FOREIGN_KEYS
from sfumato.common.kohya_gui import RENAMED
from sfumato.common.names import (
    LYCORIS_ALGOS,
    LYCORIS_MODULES,
    NETWORK_MODULES,
    OPTION_ALIASES,
)
from sfumato.compat.image_tools import IMAGE_TOOLS
from sfumato.compat.scripts import SCRIPTS, load_script_options
from sfumato.config.base import Option
from sfumato.config.option_table import group_options
from sfumato.config.rules import RULES
from sfumato.config.schema import theme_title, vocabulary

OPTIONS_PAGE_HEAD = """# Options

*Generated: `python -m sfumato.compat.table > docs/options.md`. Do not edit.*

Every option has one name: `--network_dim 16` on the command line, `network_dim = 16` in the file of `--config_file`,
whose section headings are free. The command line takes precedence over the file, the file over what a script sets, and
that over the defaults below. A switch stands alone on the command line (`--cache_latents`, off again with
`--no_cache_latents`) and is `true` or `false` in the file. The beginning of a name is taken where only one
option has it.

The file is TOML, or JSON as the window of kohya_ss saves it. As for sd-scripts, `false`, an empty text, and a 0 that is
no value of an option mean that it is not given; so does a key of another script or front end. `"1e-4"`, `64.0` and
`"True"` are what they spell, and of a key in two sections the last counts. One line before the start names all of
this. A key that is only a letter or two away from an option is an error, and `--strict` makes all of these errors.

`--plan`, behind any command that trains or fills caches, trains nothing: it checks all that can be checked before
the first weight is read, shows what the run would do, and ends with the exit code that the command would begin with, 0,
or 2 with every fault. It writes nothing but the chart of `--plot_timesteps`; a model that is named on the hub is
downloaded, since its headers are needed. Of several processes the first shows it for all.

Status: **yes**: works. **later**: known and typed, refused until the named feature is implemented.
**no effect**: accepted and reported. *Scripts*: which of sd-scripts have the option; `sfumato train` has all.
"""

SCRIPT_GROUPS = {
    "adapter": "adapter scripts",
    "full": "whole-model scripts",
    "textual_inversion": "textual inversion scripts",
    "control_net": "ControlNet scripts",
    "lllite": "LLLite",
}
OPTION_COLUMNS = """| Option | Takes | Default | Status | Scripts | Meaning |
|---|---|---|---|---|---|"""
RULES_HEAD = """*required* and *conflict* end the program before it starts; *no effect* is a line in the report,
or an error with `--strict`.
"""


def render_options_page() -> str:
    """The whole page."""
    options = vocabulary()
    parts = [OPTIONS_PAGE_HEAD, f"{len(options)} options.\n"]
    for theme, group in group_options(options.values()).items():
        parts += [f"## {theme_title(theme)}\n", OPTION_COLUMNS]
        parts.append("\n".join(format_option_row(option) for option in group) + "\n")
    return "\n".join([*parts, render_rules(), render_adapters(), render_image_scripts(), render_names()])


def format_option_row(option: Option) -> str:
    takes = "switch" if option.arity == "flag" else quote_code(option.metavar)
    default = "" if option.default in (None, "", (), {}, False) else quote_code(format_plain(option.default))
    status, scripts = describe_status(option), list_scripts(option)
    return f"| `{option.flag}` | {takes} | {default} | {status} | {scripts} | {escape_cell(option.help)} |"


def describe_status(option: Option) -> str:
    return f"no effect: {option.facts.no_effect}" if option.facts.no_effect else "yes"


def list_scripts(option: Option) -> str:
    """Which scripts of sd-scripts have the option."""
    table = load_script_options()
    if option.name in table["every script"]:
        return "all"
    homes = [SCRIPT_GROUPS[group] for group in SCRIPT_GROUPS if option.name in table[group]]
    homes += [name.removesuffix("_train_network") for name in SCRIPTS if option.name in table[name]]
    return ", ".join(homes) if homes else "ours"


def render_rules() -> str:
    lines = [
        f"| {rule.code} | {rule.severity} | {escape_cell(rule.sentence)} | {escape_cell(rule.fix)} |" for rule in RULES
    ]
    return "\n".join(
        [
            "## Rules between options\n",
            RULES_HEAD,
            "| Rule | Kind | What | What to do |\n|---|---|---|---|",
            *lines,
            "",
        ]
    )


def render_adapters() -> str:
    """What --network_dim means to each kind of adapter, and the arguments of its own."""
    lines: list[str] = []
    for _, kind in sorted(list_kinds().items()):
        if kind.options_class.model_fields or not (kind.is_wrapper or kind.replaces):
            dim = "" if kind.is_wrapper else f"; `--network_dim` is {kind.dim_meaning}"
            lines.append(f"| {kind.label}{dim} | | |")
        for name, field in kind.options_class.model_fields.items():
            lines.append(f"| | `{name}={field.default}` | {escape_cell(field.description or '')} |")
    return "\n".join(
        [
            "## Arguments of the kinds of adapters\n",
            "In `--network_args`, beside those that all kinds have: `conv_dim`, `conv_alpha`, `rank_dropout`,",
            "`module_dropout`, `rank_dropout_scale`, `network_reg_dims`, `network_reg_alphas`, `network_reg_lrs`,",
            "`include_patterns`, `exclude_patterns` (all of a layer's name with dots), `loraplus_...`, for LoRA",
            "`ggpo_sigma` with `ggpo_beta` (noise in its weights), and those of the model. One of",
            "your own: [extending.md](extending.md).\n",
            "| Kind | Argument | What |",
            "|---|---|---|",
            *lines,
            "",
        ]
    )


def render_image_scripts() -> str:
    """The options of scripts that make images which are called otherwise here, change nothing, or are refused."""
    rows: list[str] = []
    for tool in IMAGE_TOOLS.values():
        for alias, name in {**ALIASES, **tool.aliases}.items():
            rows.append(f"| {tool.name} | `--{alias}` | is `--{name}` |")
        rows += [f"| {tool.name} | `--{name}` | no effect: {why} |" for name, why in tool.no_effect.items()]
        rows += [f"| {tool.name} | `--{name}` | refused: {why} |" for name, why in tool.absent.items()]
    return "\n".join(
        [
            "## Scripts that make images\n",
            "`gen_img.py` (`gen_img_diffusers.py`), `sdxl_gen_img.py` and the `..._minimal_inference.py` of each model",
            "run `sfumato generate`, whose options they all have. Of theirs:\n",
            "| Script | Option | Here |",
            "|---|---|---|",
            *rows,
            "",
        ]
    )


def render_names() -> str:
    modules = [f"| `{name}` | {adapter} |" for name, adapter in NETWORK_MODULES.items()]
    algos = ", ".join(LYCORIS_ALGOS)
    modules += [f"| `{name}` | by the argument `algo`: {algos} |" for name in LYCORIS_MODULES]
    aliases = [f"* `--{old}` is `--{new}`." for old, new in OPTION_ALIASES.items()]
    foreign = [f"* {kind}: {', '.join(f'`{key}`' for key in keys)}." for kind, keys in FOREIGN_KEYS.items()]
    renamed = [f"`{key}` is `{option}`" for key, option in RENAMED.items()]
    return "\n".join(
        [
            "## Names in use elsewhere\n",
            "| `--network_module` | Adapter |\n|---|---|",
            *modules,
            "",
            *aliases,
            "",
            "Keys of other programs in the configuration file are named in one line and ignored:\n",
            *foreign,
            "",
            f"In a JSON file that kohya_ss saved, {', '.join(renamed)}; `LoRA_type`, `epoch`, `lr_warmup` and",
            "the other fields mean the options that its window would start sd-scripts with.",
            "",
        ]
    )


def quote_code(text: str) -> str:
    return f"`{escape_cell(text)}`" if text else ""


def escape_cell(text: str) -> str:
    return text.replace("|", "\\|")


def format_plain(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    sys.stdout.write(render_options_page())
