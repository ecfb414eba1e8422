"""The two scripts of sd-scripts that fill caches: their options, and what they fill."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from compat.helpers import GOLDENS, ROOT
from sfumato.common.names import OPTION_ALIASES, PLANNED_SCRIPTS
from sfumato.compat.cache_tools import CACHE_TOOLS, CacheToolOptions
from sfumato.compat.launch import main
from sfumato.config.schema import vocabulary

CACHES = ("cache_latents", "cache_latents_to_disk", "cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk")


@pytest.fixture
def configs(monkeypatch):
    """The config of every filling."""
    filled = []

    def fill(config, *, machine):
        filled.append(config)
        return SimpleNamespace(close=lambda: None)

    monkeypatch.setitem(sys.modules, "sfumato.tools.dataset_cache", SimpleNamespace(fill_dataset_caches=fill))
    return filled


@pytest.fixture
def argv(tmp_path) -> list[str]:
    (tmp_path / "1_a").mkdir()
    return ["--pretrained_model_name_or_path", "a/b", "--train_data_dir", str(tmp_path), "--resolution", "64"]


@pytest.mark.parametrize("name", CACHE_TOOLS)
def test_every_option_of_the_script_is_known(name):
    theirs = json.loads((GOLDENS / "cache_tool_options.json").read_text())
    ours = set(vocabulary()) | set(OPTION_ALIASES) | set(CacheToolOptions.model_fields)
    assert set(theirs[f"{name}.py"]) <= ours
    assert name not in PLANNED_SCRIPTS


@pytest.mark.parametrize(("words", "family"), [([], "sd"), (["--sdxl"], "sdxl"), (["--flux"], "flux")])
@pytest.mark.parametrize("name", CACHE_TOOLS)
def test_the_scripts_fill_one_cache_for_the_family_named(name, words, family, argv, configs, capsys):
    assert main([f"{name}.py", *words, "--skip_existing", *argv]) == 0
    (config,) = configs
    kind = CACHE_TOOLS[name]
    assert config.run.family == family
    assert {each for each in CACHES if config.value(each)} == {kind, f"{kind}_to_disk"}
    assert "--skip_existing has no effect" in capsys.readouterr().err


def test_two_families_are_refused(argv, configs, codes, capsys):
    assert main(["tools/cache_latents", "--sdxl", "--flux", *argv]) == 2
    assert codes == ["cache-tool-families-conflict"]
    assert "--sdxl and --flux" in capsys.readouterr().err
    assert not configs


@pytest.mark.parametrize("name", CACHE_TOOLS)
def test_a_launcher_runs_from_anywhere(name, tmp_path):
    words = [sys.executable, str(ROOT / "launchers" / f"{name}.py"), "--help"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, env={})
    assert (done.returncode, done.stderr) == (0, "")
    assert f"usage: {name}.py" in done.stdout
