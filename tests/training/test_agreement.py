"""Processes that were started for different runs are refused before anything is loaded."""

from __future__ import annotations

from typing import Any

import pytest

from parallel.pairs import run_strategies
from sfumato.parallel.all_reduce import AllReduce
from sfumato.training.agreement import check_agreement
from sfumato.training.start_point import StartPoint

INFO = {"options": {"learning_rate": "0.001", "seed": "7"}, "data": {"datasets": {"dataset 1": "abc"}}}


@pytest.mark.parametrize(
    ("other", "start", "fact"),
    [
        ({"options": {"learning_rate": "0.01", "seed": "7"}}, StartPoint(), "--learning_rate is 0.01 there, not 0.001"),
        ({"options": {"learning_rate": "0.001", "seed": "8"}}, StartPoint(), "--seed is 8 there, not 7"),
        ({"data": {"datasets": {"dataset 1": "abd"}}}, StartPoint(), "other images or captions"),
        ({}, StartPoint(step=3), "from step 3, not 0"),
    ],
    ids=["option", "seed", "data", "start"],
)
def test_all_processes_refuse_what_differs(other: dict[str, Any], start: StartPoint, fact: str) -> None:
    def check(parallel: AllReduce) -> None:
        check_agreement(parallel, INFO | (other if parallel.rank else {}), start if parallel.rank else StartPoint())

    for error in run_strategies(check):
        assert error.code == "processes-differ"
        assert fact in str(error)
        assert "process 1" in str(error)


def test_what_changes_no_result_may_differ() -> None:
    """Workers, the folders of caches and outputs."""

    def check(parallel: AllReduce) -> None:
        options = {**INFO["options"], "max_data_loader_n_workers": str(parallel.rank), "output_dir": str(parallel.rank)}
        check_agreement(parallel, INFO | {"options": options}, StartPoint())

    assert run_strategies(check) == [None, None]
