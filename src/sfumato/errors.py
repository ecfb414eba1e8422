"""Mistakes that the user can mend, told in one line each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """What is wrong, where, what is allowed; `fix` is the line that mends it.

    Ends the program as one clear last line and exit code 2, without a traceback.
    """

    def __init__(self, what: str, *, fix: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.what} — {self.fix}" if self.fix else self.what


class Problems:
    """Collects every fault of a stage, so that a user mends them in one go instead of one by one."""

    def __init__(self) -> None:
        self.found: list[UserError] = []

    def add(self, what: str, *, fix: str = "") -> None:
        self.found.append(UserError(what, fix=fix))

    @contextmanager
    def catch(self) -> Iterator[None]:
        """Keep a UserError raised inside for later and go on after the block."""
        try:
            yield
        except SeveralErrors as errors:
            self.found.extend(errors.errors)
        except UserError as error:
            self.found.append(error)

    def raise_all(self) -> None:
        if len(self.found) == 1:
            raise self.found[0]
        if self.found:
            raise SeveralErrors(self.found)


class SeveralErrors(UserError):
    """Several faults at once; printed one a line, the last line counts them and repeats the first."""

    def __init__(self, errors: list[UserError]) -> None:
        super().__init__(f"{len(errors)} problems, listed above; the first: {errors[0]}")
        self.errors = list(errors)
