"""sd-scripts' scripts: names, options, defaults."""

from __future__ import annotations

import pytest

from compat.helpers import ROOT, THEIR_OPTIONS
from sfumato.common.names import OPTION_ALIASES, PLANNED_SCRIPTS, RETIRED_SCRIPTS, SCRIPT_ALIASES
from sfumato.compat.file_tools import FILE_TOOLS
from sfumato.compat.image_tools import IMAGE_TOOLS
from sfumato.compat.scripts import SCRIPTS, SHARED_OPTIONS, find_script, list_absent_options, load_script_options
from sfumato.config import load_config
from sfumato.config.schema import vocabulary
from sfumato.errors import SeveralErrors, UserError

IN_GOLDENS = [name for name, script in SCRIPTS.items() if script.method in THEIR_OPTIONS]
OF_LECO = {"prompts_file": None, "max_denoising_steps": 40, "leco_denoise_guidance_scale": 3.0}  # of a later release
SAME = {"save_model_as", "guidance_scale"}  # None means what the scripts say, or the family knows better


def theirs(script: str) -> set[str]:
    options = THEIR_OPTIONS[SCRIPTS[script].method]
    return {name for name, entry in options.items() if entry["scripts"] == "all" or script in entry["scripts"]}


@pytest.mark.parametrize("name", IN_GOLDENS)
def test_a_script_has_the_options_that_it_has_in_sd_scripts(name):
    assert SCRIPTS[name].options == (theirs(name) - set(OPTION_ALIASES)) | SHARED_OPTIONS
    known = set(OF_LECO).union(*THEIR_OPTIONS.values()) - set(OPTION_ALIASES)
    assert set(list_absent_options(SCRIPTS[name])) == (known | {"family", "method"}) - SCRIPTS[name].options


@pytest.mark.parametrize("name", SCRIPTS)
def test_what_is_experimental_says_so(name):
    assert ("experimental" in SCRIPTS[name].description) == name.startswith(("flux", "sd3"))
    assert "masked_loss" in SCRIPTS[name].options
    assert "not fully tested" in vocabulary()["masked_loss"].help


@pytest.mark.parametrize("name", ["train_leco", "sdxl_train_leco"])
def test_leco_has_its_own_options_and_those_of_a_network(name):
    assert OF_LECO.keys() <= SCRIPTS[name].options
    assert {option: vocabulary()[option].default for option in OF_LECO} == OF_LECO
    assert {"network_dim", "network_alpha", "unet_lr", "dim_from_weights", "no_metadata"} <= SCRIPTS[name].options
    assert "network_train_text_encoder_only" in list_absent_options(SCRIPTS[name])


@pytest.mark.parametrize("name", IN_GOLDENS)
def test_a_script_sets_the_defaults_in_which_it_differs(name):
    for option in theirs(name) - set(OPTION_ALIASES) - SAME:
        given = THEIR_OPTIONS[SCRIPTS[name].method][option]["default"]
        default = given["by script"][name] if isinstance(given, dict) else given
        ours = SCRIPTS[name].defaults.get(option, vocabulary()[option].default)
        assert ours in (default, (default,)) or default is None, option  # lists of one value here


@pytest.mark.parametrize("name", SCRIPTS)
def test_presets_are_options_of_the_right_type(name):
    with pytest.raises(SeveralErrors) as raised:
        load_config([], defaults=SCRIPTS[name].presets)
    codes = [error.code for error in raised.value.errors]
    needs_word = ["token-string-missing"] if SCRIPTS[name].method == "textual_inversion" else []
    data = "prompts-file-missing" if SCRIPTS[name].method == "leco" else "data-missing"
    assert sorted(codes) == sorted(["model-missing", data, "output-missing", *needs_word])


def test_the_table_names_every_script():
    assert set(load_script_options()) == {"every script", "leco", *THEIR_OPTIONS, *SCRIPTS}


@pytest.mark.parametrize(
    ("name", "script"),
    [
        ("train_network", "train_network"),
        ("train_network.py", "train_network"),
        ("train_controlnet.py", "train_control_net"),
    ],
)
def test_find_script(name, script):
    assert find_script(name) is SCRIPTS[script]


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("hunyuan_image_train_network", "script-not-implemented", "available: train_network"),
        ("anima_train.py", "script-not-implemented", "anima_train is not implemented yet"),
        ("train_textual_inversion_XTI", "script-retired", "train_textual_inversion takes its place"),
        ("train_netwrk", "script-unknown", "did you mean 'train_network'?"),
    ],
)
def test_what_is_not_there(name, code, words):
    with pytest.raises(UserError) as raised:
        find_script(name)
    assert raised.value.code == code
    assert words in str(raised.value)


def test_names_of_scripts_do_not_overlap():
    assert not set(SCRIPTS) & set(PLANNED_SCRIPTS)
    assert not set(RETIRED_SCRIPTS) & {*PLANNED_SCRIPTS, *SCRIPTS}
    assert set(SCRIPT_ALIASES.values()) <= {*PLANNED_SCRIPTS, *SCRIPTS, *FILE_TOOLS, *IMAGE_TOOLS}
    assert not {*FILE_TOOLS, *IMAGE_TOOLS} & {*PLANNED_SCRIPTS, *SCRIPTS}


def test_every_available_script_has_a_launcher():
    names = {path.stem for path in (ROOT / "launchers").glob("*.py")}
    assert names >= set(SCRIPTS)
    assert all((ROOT / "launchers" / f"{name}.py").is_file() for name in (*FILE_TOOLS, *IMAGE_TOOLS))
