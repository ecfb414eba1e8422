"""A process that has imported what training needs, and forks for each script it is asked to run.

Each line of its input is a request in JSON, each line of its output the exit codes of that request's processes.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
from typing import Any, NoReturn

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.schedulers import DDIMScheduler
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel

from sfumato.families import register_families

WARM = (AutoencoderKL, UNet2DConditionModel, DDIMScheduler, CLIPTextModel, CLIPTokenizer, T5EncoderModel)  # lazy else


def serve() -> None:
    assert WARM
    register_families()
    torch.set_num_threads(1)
    os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))  # as in conftest.py
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        request = json.loads(line)
        children = [start(request, environment) for environment in request["environments"]]
        answers.write(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]) + "\n")
        answers.flush()


def start(request: dict[str, Any], environment: dict[str, str]) -> int:
    """The number of a new process that runs the script."""
    child = os.fork()
    if child == 0:
        run_and_exit(request, environment)
    return child


def run_and_exit(request: dict[str, Any], environment: dict[str, str]) -> NoReturn:
    """What ends the script ends this process, as if it had been started for it."""
    shown = os.open(request["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for descriptor, target in ((os.open(os.devnull, os.O_RDONLY), 0), (shown, 1), (shown, 2)):
        os.dup2(descriptor, target)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = request["words"]
    runpy.run_path(sys.argv[0], run_name="__main__")
    sys.exit()


if __name__ == "__main__":
    serve()
