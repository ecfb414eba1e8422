"""Pickled files of weights, read by torch's restricted unpickler: nothing in them is ever called."""

from __future__ import annotations

import pickle
import re
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sfumato.common.files import open_file
from sfumato.errors import UserError
from sfumato.formats.header import DOWNLOAD_AGAIN
from sfumato.formats.pickle_names import check_pickled_names

ZIP_SIGNATURE, LEGACY_SIGNATURE = b"PK\x03\x04", b"\x80\x02\x8a\x0a"  # torch.save's two formats
STATE_KEYS = (
    "state_dict",
    "string_to_param",
    "params_ema",
    "params",
    "model_state_dict",
    "model",
)  # under which programs nest the tensors
# What programs pickle beside the tensors and reading does not need. Each name becomes an object without behavior.
INERT_NAMES = re.compile(
    r"(pytorch_lightning|lightning|lightning_fabric|omegaconf|ldm)\.[\w.]+"
    r"|argparse\.Namespace|pathlib\.\w+|typing\.Any|(builtins\.)?(list|dict|int|float|str|bool|tuple|object)"
)
DAMAGE_ERRORS = (  # what torch's unpickler raises on damaged files, collected by damaging some 20,000
    RuntimeError,
    EOFError,
    LookupError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
    ArithmeticError,
    MemoryError,
    struct.error,
    OSError,
    zipfile.BadZipFile,
)
MAX_INERT_NAMES = 100  # in one file; each costs one more look at it
_NUMPY_NAMES = ("numpy.core.multiarray", "numpy._core.multiarray")  # before and since NumPy 2


class InertObject:
    """Stands for an object of another program: takes any arguments and any state, and does nothing."""

    def __new__(cls, *_: object, **__: object) -> InertObject:
        return super().__new__(cls)

    def __setstate__(self, state: object) -> None: ...


def load_pickle(path: Path) -> Any:
    """What torch.save wrote, with inert objects for what is not needed; mapped, not read, where the format allows.

    Raises UserError where the file is damaged, or names a function or class that is neither harmless nor known.
    """
    is_zip = _starts_as_zip(path)  # the older format cannot be mapped
    inert: dict[str, Any] = {}
    while True:
        try:
            check_pickled_names(path, is_zip=is_zip)
            with torch.serialization.safe_globals(
                [*_list_harmless(), *((value, name) for name, value in inert.items())]
            ):
                return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
        except pickle.UnpicklingError as error:
            name = _find_refused_name(error)
            if name is None:
                raise _damage_error(path, error) from None
            if not INERT_NAMES.fullmatch(name) or name in inert or len(inert) > MAX_INERT_NAMES:
                raise UserError(
                    f"{path} holds more than tensors ({name[:200]}), and loading that would run code from the file",
                    code="pickle-runs-code",
                    fix="get a safetensors version of it, or convert it with a program that you trust",
                ) from None
            inert[name] = _make_inert(name)
        except DAMAGE_ERRORS as error:
            raise _damage_error(path, error) from None


def find_state_dict(content: Any) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors, from inside `state_dict` or the like where there is one, and the numbers and texts beside them."""
    metadata: dict[str, str] = {}
    while isinstance(content, Mapping):
        metadata |= {str(key): str(value) for key, value in content.items() if isinstance(value, str | int | float)}
        inner = next((key for key in STATE_KEYS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            return {str(key): value for key, value in content.items() if isinstance(value, Tensor)}, metadata
        content = content[inner]
    return {}, metadata


def _starts_as_zip(path: Path) -> bool:
    try:
        with open_file(path) as file:
            return file.read(4) == ZIP_SIGNATURE
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror})", code="pickle-unreadable", fix=DOWNLOAD_AGAIN
        ) from error


def _list_harmless() -> Iterator[tuple[Callable[..., Any], str]]:
    """Containers and NumPy's numbers: callables, each under the name that files have for it."""
    yield _make_dict, "collections.defaultdict"
    scalar: Any = np.float64(0).__reduce__()[0]
    rebuild: Any = np.zeros(1).__reduce__()[0]
    for module in _NUMPY_NAMES:
        yield scalar, f"{module}.scalar"
        yield rebuild, f"{module}._reconstruct"
    yield np.ndarray, "numpy.ndarray"
    yield np.dtype, "numpy.dtype"
    for kind in {type(np.dtype(code)) for code in "?bhilqBHILQefdUS"}:
        yield kind, f"numpy.dtypes.{kind.__name__}"


def _make_dict(*_: object) -> dict[Any, Any]:
    """In place of a defaultdict, whose factory is of no use."""
    return {}


def _make_inert(name: str) -> Any:
    """dict for another program's kind of dict, whose entries are set after it is made; else an inert class."""
    return dict if name.endswith("AttributeDict") else type(name, (InertObject,), {})


def _find_refused_name(error: pickle.UnpicklingError) -> str | None:
    match = re.search(r"GLOBAL (\S+)", str(error))
    if match is None:
        return None
    return match[1] if "." in match[1] else f"builtins.{match[1]}"


def _damage_error(path: Path, error: Exception) -> UserError:
    sentence = str(error).partition("\n")[0].partition(". ")[0]
    return UserError(f"{path} is damaged ({sentence})", code="pickle-damaged", fix=DOWNLOAD_AGAIN)
