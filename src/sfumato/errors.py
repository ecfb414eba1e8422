"""Mistakes that the user can fix, each with a code, and faults of ours that should be reported."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class UserError(Exception):
    """What is wrong, where, what is allowed; `fix` is the line that fixes it, `code` its name in docs/errors.md.

    Ends the program as one clear last line and exit code 2, without a traceback.
    """

    def __init__(self, what: str, *, code: str, fix: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.code = code
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.what} — {self.fix}" if self.fix else self.what


class InternalError(Exception):
    """A fault of this program, e.g. a key map without a rule; nothing that the user did is wrong.

    Ends the program with a traceback, a last line that asks for a report, and exit code 1.
    """

    def __str__(self) -> str:
        return f"internal error, please report it: {super().__str__()}"


class Problems:
    """Collects every fault of a stage, so that a user fixes them in one go instead of one by one."""

    def __init__(self) -> None:
        self.found: list[UserError] = []

    def add(self, what: str, *, code: str, fix: str = "") -> None:
        self._keep([UserError(what, code=code, fix=fix)])

    @contextmanager
    def catch(self) -> Iterator[None]:
        """Keep a UserError raised inside for later and go on after the block."""
        try:
            yield
        except SeveralErrors as errors:
            self._keep(errors.errors)
        except UserError as error:
            self._keep([error])

    def _keep(self, errors: Sequence[UserError]) -> None:
        """A fault that two checks meet (both read the same file, say) is said once."""
        said = {str(error) for error in self.found}
        self.found += [error for error in errors if str(error) not in said]

    def raise_all(self) -> None:
        if len(self.found) == 1:
            raise self.found[0]
        if self.found:
            raise SeveralErrors(self.found)


class SeveralErrors(UserError):
    """Several faults at once; printed one a line, the last line counts them and repeats the first."""

    def __init__(self, errors: list[UserError]) -> None:
        super().__init__(f"{len(errors)} problems, listed above; the first: {errors[0]}", code=errors[0].code)
        self.errors = list(errors)

    @property
    def codes(self) -> list[str]:
        """The code of each fault, in order."""
        return [error.code for error in self.errors]
