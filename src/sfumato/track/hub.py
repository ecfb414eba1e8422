"""Copies on the hub: what is saved goes up, at once or while training goes on; a state comes down to resume from."""

from __future__ import annotations

import logging
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import TYPE_CHECKING, Self

from sfumato.config import HubOptions
from sfumato.config.secrets import scrubbed
from sfumato.errors import UserError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

log = logging.getLogger(__name__)
TYPES = ("model", "dataset", "space")
SPELLING = "user/repository/path[:revision[:type]]"


class Hub:
    """Uploads in one thread, one after the other. A failed one is a warning: training never ends for it.

    secrets: what no warning may repeat, even where an answer of the hub does.
    """

    def __init__(self, options: HubOptions, secrets: Collection[str]) -> None:
        self.options, self.secrets = options, secrets
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="hub")
        self.waiting: dict[Path, Future[None]] = {}
        self.ready = False  # whether the repository is known to be there

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for all uploads; after a second Ctrl-C only for the one on its way."""
        cancel = kind is not None and not issubclass(kind, Exception)
        self.thread.shutdown(cancel_futures=cancel)

    def upload(self, path: Path, *, last: bool = False) -> None:
        """A saved file or folder under its own name. With --async_upload only the last ones are waited for."""
        if self.options.huggingface_repo_id is None:
            return
        self.waiting[path] = self.thread.submit(self._send, path)
        self.waiting[path].add_done_callback(lambda done: self._tell(path, done))
        if last or not self.options.async_upload:
            self.finish(path)

    def upload_state(self, folder: Path, *, last: bool = False) -> None:
        if self.options.save_state_to_huggingface:
            self.upload(folder, last=last)

    def finish(self, path: Path) -> None:
        """Wait until a path is up, as before it is removed here."""
        if path in self.waiting:
            self.waiting.pop(path).exception()  # told by the thread

    def _send(self, path: Path) -> None:
        options, api = self.options, api_of(self.options)
        repository, kind = options.huggingface_repo_id, options.huggingface_repo_type
        assert repository is not None
        if not self.ready:
            private = options.huggingface_repo_visibility != "public"
            api.create_repo(repository, repo_type=kind, private=private, exist_ok=True)
            self.ready = True
        place = str(PurePosixPath(options.huggingface_path_in_repo or "", path.name))
        if path.is_dir():
            api.upload_folder(repo_id=repository, repo_type=kind, folder_path=path, path_in_repo=place)
        else:
            api.upload_file(repo_id=repository, repo_type=kind, path_or_fileobj=path, path_in_repo=place)

    def _tell(self, path: Path, done: Future[None]) -> None:
        if done.cancelled():
            log.warning("%s was not uploaded: the run was ended first", path.name)
        elif error := done.exception():
            log.warning("%s was not uploaded: %s", path.name, reason(error, self.secrets))
        else:
            log.info("uploaded %s to %s", path.name, self.options.huggingface_repo_id)


def fetch_state(options: HubOptions, resume: Path, secrets: Collection[str]) -> Path:
    """Download the state, or the folder of states, that --resume names on the hub; gives its folder here.

    Raises UserError when it cannot be had: a run that was to go on must not start anew.
    """
    repository, path, revision, kind = parts_of(resume)
    pattern = f"{path}/*" if path else None
    with ThreadPoolExecutor(1) as thread:  # holds whatever the hub's client raises
        answer = thread.submit(
            api_of(options).snapshot_download,
            repository,
            repo_type=kind,
            revision=revision,
            allow_patterns=pattern,
        )
        error = answer.exception()
    if error is not None:
        raise UserError(
            f"--resume_from_huggingface: {repository} could not be fetched: {reason(error, secrets)}",
            fix="check the name, the connection, and `hf auth login`",
        )
    return Path(str(answer.result()), path)


def parts_of(resume: Path) -> tuple[str, str, str | None, str | None]:
    """user/repository/path[:revision[:type]] -> (user/repository, path, revision, type)."""
    name, *more = resume.as_posix().split(":")
    owner, _, rest = name.partition("/")
    repository, _, path = rest.partition("/")
    revision, kind = [each or None for each in (*more, "", "")[:2]]
    if not owner or not repository or len(more) > 2 or kind not in (None, *TYPES):
        raise UserError(f"--resume {resume.as_posix()} names nothing on the hub", fix=f"write {SPELLING}")
    return f"{owner}/{repository}", path, revision, kind


def api_of(options: HubOptions) -> HfApi:
    """The hub's client; without --huggingface_token it takes the environment's or that of `hf auth login`."""
    from huggingface_hub import HfApi

    token = options.huggingface_token
    return HfApi(token=token.get_secret_value() if token else None)


def reason(error: BaseException, secrets: Collection[str]) -> str:
    """An error in one line, without secrets."""
    return scrubbed(" ".join(f"{type(error).__name__}: {error}".split()), secrets)
