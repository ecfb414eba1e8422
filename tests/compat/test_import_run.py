"""`sfumato import`: what it writes trains the same as the command or file that it was given."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from sfumato.cli.main import main
from sfumato.compat.command_text import find_old_commands
from sfumato.compat.scripts import SCRIPTS, list_absent_options
from sfumato.config import load_config

OPTIONS = [
    *("--pretrained_model_name_or_path", "models/sd xl.safetensors", "--train_data_dir=C:\\photos\\my cat"),
    *("--output_dir", "out put", "--network_module=networks.lora", "--network_args", "conv_dim=4", "conv_alpha=1"),
    *("--resolution=1024,1024", "--max_train_steps", "100", "--cache_latents", "--learning_rate", "1e-4"),
]
POWERSHELL = """# train.ps1
$model = "models/sd xl.safetensors"
$env:OUT = "out put"
python -m accelerate.commands.launch --num_cpu_threads_per_process=8 "./sd-scripts/sdxl_train_network.py" `
  --pretrained_model_name_or_path $model "--train_data_dir=C:\\photos\\my cat" `
  --output_dir $env:OUT --network_module=networks.lora --network_args "conv_dim=4" "conv_alpha=1" `
  --resolution=1024,1024 --max_train_steps 100 --cache_latents --learning_rate 1e-4
pause
"""
BATCH = """@echo off
REM accelerate launch train_network.py --old
set "MODEL=models/sd xl.safetensors"
set OUT=out put
call venv\\Scripts\\activate.bat
accelerate launch sdxl_train_network.py ^
  --pretrained_model_name_or_path "%MODEL%" --train_data_dir="C:\\photos\\my cat" --output_dir "%OUT%" ^
  --network_module=networks.lora --network_args "conv_dim=4" "conv_alpha=1" ^
  --resolution=1024,1024 --max_train_steps 100 --cache_latents --learning_rate 1e-4 2>&1 | tee log.txt
"""
SHELL = """#!/bin/bash
export OUT='out put'
MODEL="models/sd xl.safetensors"   \nif accelerate launch --mixed_precision bf16 sdxl_train_network.py \\
  --pretrained_model_name_or_path "${MODEL}" --train_data_dir='C:\\photos\\my cat' --output_dir "$OUT" \\
  --network_module=networks.lora --network_args "conv_dim=4" "conv_alpha=1" \\
  --resolution=1024,1024 --max_train_steps 100 --cache_latents --learning_rate 1e-4 ; then echo done; fi
"""


@pytest.mark.parametrize("text", [POWERSHELL, BATCH, SHELL], ids=["powershell", "batch", "shell"])
def test_the_words_of_a_command_are_those_that_its_shell_would_pass(text: str) -> None:
    (command,) = find_old_commands(text)
    assert command.script == "sdxl_train_network"
    assert command.options == OPTIONS


def test_words_are_split_as_by_a_shell() -> None:
    line = """train_network.py --a='x y' --b "it's" -c="q"d --e 'say "hi"'"""
    (command,) = find_old_commands(line)
    assert command.options == shlex.split(line)[1:]


def test_commands_of_one_line_and_paths_that_end_in_a_backslash() -> None:
    text = (
        "cd fine_tune && accelerate launch train_network.py --a 1 && python sdxl_train_network.py --b 2; echo done\n"
        "set OUT=C:\\out\\\nset IN=C:\\in\\\n"
        'python fine_tune.py --output_dir %OUT% --train_data_dir %IN% --optimizer_args "betas=\\"0.9,0.99\\""\n'
    )
    found = [(command.script, command.options) for command in find_old_commands(text)]
    assert found == [
        ("train_network", ["--a", "1"]),
        ("sdxl_train_network", ["--b", "2"]),
        (
            "fine_tune",
            ["--output_dir", "C:\\out\\", "--train_data_dir", "C:\\in\\", "--optimizer_args", 'betas="0.9,0.99"'],
        ),
    ]


def test_the_file_that_is_written_has_the_options_of_the_command(tmp_path: Path) -> None:
    source, target = tmp_path / "old.sh", tmp_path / "new.toml"
    source.write_text(SHELL)
    assert main(["import", str(source), "--save_to", str(target)]) == 0
    script = SCRIPTS["sdxl_train_network"]
    old = load_config(OPTIONS, defaults=script.presets, absent=list_absent_options(script), check_files=False)
    new = load_config(["--config_file", str(target)], check_files=False)
    left_out = {"sources", "notes", "run"}
    assert new.model_dump(exclude=left_out) == old.model_dump(exclude=left_out)
    assert (new.run.family, new.run.method) == (old.run.family, old.run.method)


def test_what_a_run_would_ignore_is_said_and_secrets_are_not_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "flux.toml"
    source.write_text(
        '[a]\nhuggingface_token = "hf_secret"\nlora_name = "mine"\npretrained_model_name_or_path = "f.safetensors"\n'
        'output_dir = "o"\ntrain_data_dir = "i"\nsdxl_no_half_vae = true\n'
    )
    assert main(["import", str(source), "--script", "flux_train_network.py"]) == 0
    shown = capsys.readouterr().out
    assert 'family = "flux"' in shown
    assert "--huggingface_token is a secret and is not written" in shown
    assert "hf_secret" not in shown
    assert "lora_name" in next(line for line in shown.splitlines() if line.startswith("# flux.toml: ignored"))


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["import", "python", "main.py"], "import-without-command"),
        (["import", "train_network.py --output_dir $OUT"], "import-variable-unset"),
        (["import", "train_network.py --a\nsdxl_train_network.py --b"], "import-several-commands"),
        (["import", "{toml}"], "import-script-missing"),
        (["import", "train_network.py --output_dir o", "--script", "train_db"], "import-script-named-twice"),
        (["import", "train_network.py --output_dir o --train_data_dir i"], "model-missing"),
    ],
)
def test_what_cannot_be_imported_is_said(
    words: list[str], code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sfumato.cli.main import dispatch
    from sfumato.errors import UserError

    toml = tmp_path / "run.toml"
    toml.write_text("network_dim = 4\n")
    with pytest.raises(UserError) as caught:
        dispatch([word.replace("{toml}", str(toml)) for word in words])
    assert caught.value.code == code
