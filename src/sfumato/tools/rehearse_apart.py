"""A rehearsal in a process of its own, for programs that go on with a GPU."""

from __future__ import annotations

import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from unittest.mock import patch

from sfumato.config import Config
from sfumato.errors import UserError
from sfumato.memory.rehearsal.backend import is_supported
from sfumato.plan import make_run_plan
from sfumato.tools.rehearsal_stages import Stage
from sfumato.tools.rehearse import rehearse_plan

NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}


def rehearse_apart(config: Config, *, saves: bool = True) -> list[Stage]:
    """The stages of this run, as `rehearse_plan` gives them; none where torch is too old for it.

    RuntimeError, with its message, where that fails.

    torch keeps the rehearsal's device until its process ends, and takes it for the machine's accelerator from then on:
    backward on a GPU would run on the wrong streams.
    """
    if not is_supported():
        return []
    context = multiprocessing.get_context("spawn")
    with patch.dict(os.environ, NO_GPU), ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(rehearse_config, config, saves).result()


def rehearse_config(config: Config, saves: bool) -> list[Stage]:
    try:
        return rehearse_plan(make_run_plan(config, processes=1, remember=False), saves=saves)
    except UserError as error:  # its arguments do not travel between processes
        raise RuntimeError(str(error)) from None
