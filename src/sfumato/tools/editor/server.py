"""The editor's server: for this computer alone, and for nobody without the address that it printed.

Every path begins with a random token. Requests under another host's name are refused (a page of another site cannot
point its own name here), and so are those that another site's page sends. No path, name or folder ever comes from a
request: images and captions go by number.
"""

from __future__ import annotations

import hmac
import json
import secrets
import socket
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.message import Message
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from importlib.resources import files
from socketserver import ThreadingTCPServer
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sfumato.common.json_toml import decode_json
from sfumato.data.captions import MAX_CAPTION_BYTES
from sfumato.errors import UserError
from sfumato.tools.editor.session import EditSession
from sfumato.tools.editor.text_changes import TextChange
from sfumato.tools.editor.thumbnails import THUMBNAIL_SIDE, VIEW_SIDE, ThumbnailCache

LOCALHOST = "127.0.0.1"
LOCAL_NAMES = (LOCALHOST, "localhost")  # also at the near end of an SSH tunnel, with another port
MAX_BODY_BYTES = 8 << 20
IDLE_SECONDS = 60.0  # of a connection
PAGE_SCRIPTS = ("bulk.js", "detail.js", "editor.js", "grid.js", "store.js", "texts.js")
PAGE_FILES = {
    "": ("index.html", "text/html; charset=utf-8"),
    "editor.css": ("editor.css", "text/css; charset=utf-8"),
    **{name: (name, "text/javascript; charset=utf-8") for name in PAGE_SCRIPTS},
}
SAFETY_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
FileNumber = Annotated[int, Field(ge=0, strict=True)]
CaptionText = Annotated[str, Field(max_length=MAX_CAPTION_BYTES)]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class EditRequest(_Request):
    file: FileNumber
    text: CaptionText
    base: CaptionText


class ChangeRequest(_Request):
    files: Annotated[list[FileNumber], Field(max_length=1_000_000)]
    change: TextChange
    preview: bool = False


class MoveRequest(_Request):
    direction: Literal["undo", "redo"]
    steps: Annotated[int, Field(ge=1, le=1_000_000)] = 1


class CountRequest(_Request):
    file: FileNumber
    text: CaptionText


@dataclass(frozen=True, kw_only=True)
class EditorServer:
    """What requests need to know. `run` serves until it is interrupted."""

    session: EditSession
    thumbnails: ThumbnailCache
    token: str

    def run(self, listener: ThreadingTCPServer) -> None:
        with listener:
            listener.serve_forever(poll_interval=0.2)

    def handle_post(self, name: str, content: Any) -> dict[str, Any] | None:
        """The answer to an action; None for an unknown one. ValueError for content that is not as it must be."""
        session = self.session
        if name == "edit":
            edit = EditRequest.model_validate(content)
            return session.edit(edit.file, edit.text, base=edit.base)
        if name == "change":
            request = ChangeRequest.model_validate(content)
            act = session.preview if request.preview else session.change_many
            return act(request.files, request.change)
        if name == "move":
            move = MoveRequest.model_validate(content)
            return (session.undo if move.direction == "undo" else session.redo)(move.steps)
        if name == "count":
            count = CountRequest.model_validate(content)
            return session.count_tokens(count.file, count.text)
        return None


def make_token() -> str:
    return secrets.token_urlsafe(24)


def open_listener(server: EditorServer, port: int) -> ThreadingTCPServer:
    """Listen on this computer's own address; port 0: any free one. UserError where the port is taken."""
    try:
        return _Listener((LOCALHOST, port), partial(_Handler, server))
    except OSError as error:
        raise UserError(
            f"--port: {LOCALHOST}:{port} cannot be used ({error.strerror})",
            code="editor-port-taken",
            fix="give another port; by default a free one is found",
        ) from error


class _Listener(ThreadingTCPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 64

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A page that was closed in the middle of an answer is no fault worth a traceback."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "sfumato", ""
    timeout = IDLE_SECONDS

    def __init__(
        self, editor: EditorServer, request: socket.socket, address: Any, listener: ThreadingTCPServer
    ) -> None:
        self.editor = editor
        super().__init__(request, address, listener)

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self, method: Callable[[str, str], None]) -> None:
        """Check who asks, then answer."""
        refusal = find_refusal(self.headers)
        if refusal:
            return self._refuse(HTTPStatus.FORBIDDEN, refusal)
        path, _, query = self.path.partition("?")
        token, slash, rest = path.removeprefix("/").partition("/")
        if not slash or not hmac.compare_digest(token.encode(), self.editor.token.encode()):
            return self._refuse(HTTPStatus.NOT_FOUND, "Open the whole address that sfumato printed.")
        return method(rest, query)

    def _get(self, name: str, query: str) -> None:
        session = self.editor.session
        if name in PAGE_FILES:
            file, kind = PAGE_FILES[name]
            self._send(files("sfumato.tools.editor").joinpath("page", file).read_bytes(), kind)
        elif name == "state":
            self._send_json(session.read_state())
        elif name == "changes":
            since = query.removeprefix("since=")
            if not since.isdecimal() or len(since) > 15:
                return self._refuse(HTTPStatus.BAD_REQUEST, "since= must be a revision")
            self._send_json(session.list_changes(int(since)))
        elif name.startswith(("thumbnail/", "view/")):
            side, _, number = name.partition("/")
            self._send_image(number, THUMBNAIL_SIDE if side == "thumbnail" else VIEW_SIDE)
        else:
            self._refuse(HTTPStatus.NOT_FOUND, "There is no such page.")
        return None

    def _send_image(self, number: str, side: int) -> None:
        if not number.isdecimal() or len(number) > 9 or int(number) >= len(self.editor.thumbnails.images):
            return self._refuse(HTTPStatus.NOT_FOUND, "There is no such image.")
        try:
            data = self.editor.thumbnails.get(int(number), side)
        except UserError as error:
            return self._refuse(HTTPStatus.NOT_FOUND, str(error))
        return self._send(data, "image/webp", cache="private, max-age=31536000, immutable")

    def _post(self, name: str, query: str) -> None:
        length = self.headers.get("Content-Length", "")
        if self.headers.get_content_type() != "application/json":
            return self._refuse(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "JSON was expected.")
        if not length.isdecimal() or len(length) > 15 or int(length) > MAX_BODY_BYTES:
            return self._refuse(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"At most {MAX_BODY_BYTES:,} bytes are taken.")
        try:
            answer = self.editor.handle_post(name, decode_json(self.rfile.read(int(length))))
        except ValidationError as error:
            fault = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(map(str, fault["loc"]))
            return self._refuse(HTTPStatus.BAD_REQUEST, f"{where}: {fault['msg']}")
        except ValueError as error:
            return self._refuse(HTTPStatus.BAD_REQUEST, str(error))
        if answer is None:
            return self._refuse(HTTPStatus.NOT_FOUND, "There is no such action.")
        return self._send_json(answer)

    def _refuse(self, status: HTTPStatus, text: str) -> None:
        self.close_connection = True  # the body, if any, is not read
        self._send(text.encode(), "text/plain; charset=utf-8", status=status)

    def _send_json(self, content: Mapping[str, Any]) -> None:
        self._send(json.dumps(content, separators=(",", ":")).encode(), "application/json")

    def _send(self, data: bytes, kind: str, *, status: HTTPStatus = HTTPStatus.OK, cache: str = "no-store") -> None:
        self.send_response(status)
        headers = {"Content-Type": kind, "Content-Length": str(len(data)), "Cache-Control": cache, **SAFETY_HEADERS}
        if self.close_connection:
            headers["Connection"] = "close"
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


def find_refusal(headers: Message) -> str:
    """Why a request is not answered; "" for one of our own page, or of a user's hand."""
    host = headers.get("Host", "")
    if host.rpartition(":")[0] not in LOCAL_NAMES and host not in LOCAL_NAMES:
        return "This page is for this computer alone."
    origin = headers.get("Origin")
    if origin is not None and origin != f"http://{host}":
        return "This page takes no requests of others."
    return ""
