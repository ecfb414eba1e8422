"""Models in the ONNX format: found in a folder or on the hub, and opened by onnxruntime."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from sfumato.common.library_call import call_library, give_reason, read_first_line
from sfumato.errors import UserError

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

PROVIDERS = ("OpenVINOExecutionProvider", "CUDAExecutionProvider", "ROCMExecutionProvider", "CPUExecutionProvider")


def download_files(repo_id: str, names: Sequence[str], folder: Path, *, advice: str) -> None:
    """advice: what else than a download there is to do. UserError where the hub does not provide a file."""
    from huggingface_hub import hf_hub_download

    for name in names:
        error = call_library(partial(hf_hub_download, repo_id, name, local_dir=folder, force_download=True)).exception()
        if error is None:
            continue
        raise UserError(
            f"the hub did not provide {' and '.join(names)} of {repo_id} ({give_reason(error)})",
            code="onnx-model-unavailable",
            fix=f"download them into {folder}, or {advice}",
        ) from error


def open_session(model: Path, *, purpose: str) -> InferenceSession:
    """On the first that this machine has of OpenVINO, CUDA, ROCm and the CPU. purpose: what needs it."""
    try:
        import onnxruntime
        import onnxruntime.capi.onnxruntime_pybind11_state as faults
    except ImportError as error:
        raise UserError(
            f"{purpose} needs onnxruntime, which is not installed",
            code="onnx-package-missing",
            fix='pip install "sfumato[tagger]", or pip install onnxruntime-gpu for a GPU',
        ) from error
    if not model.is_file():
        raise UserError(f"{model} does not exist", code="onnx-model-missing", fix="check the path")
    onnxruntime.set_default_logger_severity(3)  # errors alone: it warns of every provider that a machine lacks
    available = onnxruntime.get_available_providers()
    providers = [name for name in PROVIDERS if name in available]
    try:
        return onnxruntime.InferenceSession(str(model), providers=providers)
    except (faults.Fail, faults.InvalidGraph, faults.InvalidProtobuf, faults.NoModel, faults.NotImplemented) as error:
        raise UserError(
            f"{model} cannot be opened by onnxruntime ({read_first_line(error)})",
            code="onnx-model-invalid",
            fix="remove it, so that it is downloaded again, or give another file",
        ) from error
