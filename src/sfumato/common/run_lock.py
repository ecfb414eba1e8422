"""One run per name: a lock beside the files of a run, held by the process that writes them."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

from sfumato.common.locks import lock_for_process
from sfumato.errors import UserError


class RunLock:
    """The lock file `.NAME.lock` in the output folder, removed at the end; one that a dead process left is taken over.

    UserError where another process holds it.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.path = folder / f".{name}.lock"
        self.created_folder = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        self.file: BinaryIO | None = None
        while self.file is None:
            self.file = self._open(name)
        self.file.truncate(0)
        self.file.write(f"{os.getpid()}\n".encode())
        self.file.flush()

    def _open(self, name: str) -> BinaryIO | None:
        """None where the file was removed meanwhile by the run that held it."""
        file = self.path.open("a+b")
        if not lock_for_process(file.fileno()):
            file.seek(0)
            holder = file.read(20).decode("ascii", "replace").strip() if os.name != "nt" else ""
            file.close()
            raise UserError(
                f"another run named {name!r} is writing into {self.path.parent}: it holds the lock {self.path}"
                + (f" (process {holder})" if holder else ""),
                code="run-name-in-use",
                fix="wait for it, stop it, or give another --output_name",
            )
        try:
            same = os.path.samestat(os.fstat(file.fileno()), self.path.stat())
        except FileNotFoundError:
            same = False
        if not same:
            file.close()
        return file if same else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def release(self) -> None:
        """Remove the file; an empty folder goes, too, where it was not there before."""
        if self.file is None:
            return
        if os.name == "nt":  # which removes no open file
            self.file.close()
        with suppress(OSError):  # e.g. the folder was deleted, or is read-only by now
            self.path.unlink(missing_ok=True)
        self.file.close()
        self.file = None
        if self.created_folder:
            with suppress(OSError):  # it has files
                self.path.parent.rmdir()
