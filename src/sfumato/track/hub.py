"""The Hugging Face hub: uploads of what is saved, at once or while training goes on, and the download of a state."""

from __future__ import annotations

import logging
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import TYPE_CHECKING, Self

from sfumato.common.library_call import call_library
from sfumato.config import HubOptions
from sfumato.config.secrets import redact
from sfumato.errors import UserError

if TYPE_CHECKING:
    from huggingface_hub import HfApi

log = logging.getLogger(__name__)
REPO_TYPES = ("model", "dataset", "space")
REPO_PATH_FORMAT = "user/repository/path[:revision[:type]]"


class Hub:
    """Uploads in one thread, one after the other. A failed upload is a warning; training goes on.

    secrets: removed from warnings, which may quote an answer of the hub.
    """

    def __init__(self, options: HubOptions, secrets: Collection[str]) -> None:
        self.options, self.secrets = options, secrets
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="hub")
        self.waiting: dict[Path, Future[None]] = {}
        self.ready = False  # whether the repository exists

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for all uploads; after a second Ctrl-C only for the current one."""
        cancel = kind is not None and not issubclass(kind, Exception)
        self.thread.shutdown(cancel_futures=cancel)

    def upload(self, path: Path, *, last: bool = False) -> None:
        """Upload a saved file or folder under its own name. With --async_upload, wait only for the `last` ones."""
        if self.options.huggingface_repo_id is None:
            return
        self.waiting[path] = self.thread.submit(self._send, path)
        self.waiting[path].add_done_callback(lambda done: self._report_upload(path, done))
        if last or not self.options.async_upload:
            self.finish(path)

    def upload_state(self, folder: Path, *, last: bool = False) -> None:
        if self.options.save_state_to_huggingface:
            self.upload(folder, last=last)

    def finish(self, path: Path) -> None:
        """Wait for the upload of a path, e.g. before it is deleted."""
        if path in self.waiting:
            self.waiting.pop(path).exception()  # already logged by the thread

    def _send(self, path: Path) -> None:
        options, api = self.options, make_api(self.options)
        repository, repo_type = options.huggingface_repo_id, options.huggingface_repo_type
        assert repository is not None
        if not self.ready:
            private = options.huggingface_repo_visibility != "public"
            api.create_repo(repository, repo_type=repo_type, private=private, exist_ok=True)
            self.ready = True
        target = str(PurePosixPath(options.huggingface_path_in_repo or "", path.name))
        if path.is_dir():
            api.upload_folder(repo_id=repository, repo_type=repo_type, folder_path=path, path_in_repo=target)
        else:
            api.upload_file(repo_id=repository, repo_type=repo_type, path_or_fileobj=path, path_in_repo=target)

    def _report_upload(self, path: Path, done: Future[None]) -> None:
        if done.cancelled():
            log.warning("%s was not uploaded: the run ended first", path.name)
        elif error := done.exception():
            log.warning("%s was not uploaded: %s", path.name, describe_error(error, self.secrets))
        else:
            log.info("uploaded %s to %s", path.name, self.options.huggingface_repo_id)


def fetch_state(options: HubOptions, resume: Path, secrets: Collection[str]) -> Path:
    """Download the state, or the folder of states, that --resume names on the hub; returns its local folder.

    UserError when that fails.
    """
    repository, path, revision, repo_type = parse_repo_path(resume)
    patterns = f"{path}/*" if path else None
    fetch = partial(
        make_api(options).snapshot_download, repository, repo_type=repo_type, revision=revision, allow_patterns=patterns
    )
    download = call_library(fetch)
    error = download.exception()
    if error is not None:
        raise UserError(
            f"--resume_from_huggingface: cannot download {repository}: {describe_error(error, secrets)}",
            code="hub-download-failed",
            fix="check the name, the connection, and `hf auth login`",
        )
    return Path(str(download.result()), path)


def parse_repo_path(resume: Path) -> tuple[str, str, str | None, str | None]:
    """user/repository/path[:revision[:type]] -> (user/repository, path, revision, type)."""
    name, *more = resume.as_posix().split(":")
    owner, _, rest = name.partition("/")
    repository, _, path = rest.partition("/")
    revision, repo_type = [text or None for text in (*more, "", "")[:2]]
    if not owner or not repository or len(more) > 2 or repo_type not in (None, *REPO_TYPES):
        raise UserError(
            f"--resume {resume.as_posix()} is not a path on the hub",
            code="hub-path-invalid",
            fix=f"write {REPO_PATH_FORMAT}",
        )
    return f"{owner}/{repository}", path, revision, repo_type


def make_api(options: HubOptions) -> HfApi:
    """The hub's client; the default token is the environment's or that of `hf auth login`."""
    from huggingface_hub import HfApi

    token = options.huggingface_token
    return HfApi(token=token.get_secret_value() if token else None)


def describe_error(error: BaseException, secrets: Collection[str]) -> str:
    """An error in one line, without secrets."""
    return redact(" ".join(f"{type(error).__name__}: {error}".split()), secrets)
