"""Models in the ONNX format: found in a folder or on the hub, and opened by onnxruntime."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sfumato.errors import UserError

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

PROVIDERS = ("OpenVINOExecutionProvider", "CUDAExecutionProvider", "ROCMExecutionProvider", "CPUExecutionProvider")


def download_files(repo_id: str, names: Sequence[str], folder: Path, *, advice: str) -> None:
    """advice: what else than a download there is to do. UserError where the hub does not provide a file."""
    from huggingface_hub import hf_hub_download

    try:
        for name in names:
            hf_hub_download(repo_id, name, local_dir=folder, force_download=True)
    except (OSError, ValueError) as error:  # not found, no access, no connection, a malformed name
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"the hub did not provide {' and '.join(names)} of {repo_id} ({reason})",
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
            f"{model} cannot be opened by onnxruntime ({str(error).splitlines()[0]})",
            code="onnx-model-invalid",
            fix="remove it, so that it is downloaded again, or give another file",
        ) from error
