"""Who the caption editor answers, and what: by raw requests of the standard library's client."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator, Mapping
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from PIL import Image

from sfumato.errors import UserError
from sfumato.tools.editor.server import LOCALHOST, MAX_BODY_BYTES, PAGE_FILES, EditorServer, make_token, open_listener
from sfumato.tools.editor.thumbnails import ThumbnailCache
from tools.editing import Editor

JSON = {"Content-Type": "application/json"}


class Answer(NamedTuple):
    status: int
    headers: Mapping[str, str]
    body: bytes


class Client(NamedTuple):
    """Asks the server of a folder of three images."""

    port: int
    token: str
    folder: Path

    def ask(
        self, path: str, *, method: str = "GET", body: Any = None, headers: Mapping[str, str] | None = None
    ) -> Answer:
        """path: behind the token, unless it begins with a slash."""
        connection = HTTPConnection(LOCALHOST, self.port, timeout=10)
        whole = path if path.startswith("/") else f"/{self.token}/{path}"
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        connection.request(method, whole, data, dict(headers or {}))
        response = connection.getresponse()
        answer = Answer(response.status, dict(response.getheaders()), response.read())
        connection.close()
        return answer

    def post(self, path: str, body: Any, **headers: str) -> Answer:
        return self.ask(path, method="POST", body=body, headers=JSON | headers)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    folder = tmp_path_factory.mktemp("edited") / "images"
    folder.mkdir()
    for name in ("a", "b", "c"):
        Image.new("RGB", (64, 32), "red").save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"a cat, {name}")
    (folder.parent / "secret.txt").write_text("secret")
    editor = Editor(folder)
    thumbnails = ThumbnailCache(
        editor.session.dataset.images, folder.parent / "thumbnails", editor.session.add_image_fault
    )
    server = EditorServer(session=editor.session, thumbnails=thumbnails, token=make_token())
    listener = open_listener(server, 0)
    thread = threading.Thread(target=server.run, args=(listener,))
    thread.start()
    yield Client(listener.server_address[1], server.token, folder)
    listener.shutdown()
    thread.join()


def test_the_page_and_its_data(client: Client) -> None:
    for name, (_, kind) in PAGE_FILES.items():
        answer = client.ask(name)
        assert (answer.status, answer.headers["Content-Type"]) == (200, kind)
        assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
        assert answer.headers["Referrer-Policy"] == "no-referrer"  # the address holds the token
        assert b"http:" not in answer.body.replace(b"http://www.w3.org/2000/svg", b"").replace(b"http%3A", b"")
        assert b"https:" not in answer.body  # nothing from elsewhere
    state = json.loads(client.ask("state").body)
    assert [image["name"] for image in state["images"]] == ["a.png", "b.png", "c.png"]
    assert [(image["width"], image["height"]) for image in state["images"]] == [(64, 32)] * 3
    assert [file["text"] for file in state["files"]] == ["a cat, a", "a cat, b", "a cat, c"]
    for place, size in (("thumbnail/1", (64, 32)), ("view/1?v=7", (64, 32))):
        answer = client.ask(place)
        assert answer.headers["Content-Type"] == "image/webp"
        (client.folder.parent / "seen.webp").write_bytes(answer.body)
        assert Image.open(client.folder.parent / "seen.webp").size == size


def test_actions_change_files(client: Client) -> None:
    assert json.loads(client.post("edit", {"file": 0, "text": "new", "base": "a cat, a"}).body)["changed"] == [0]
    assert (client.folder / "a.txt").read_text() == "new\n"
    change = {"action": "replace", "find": "cat", "replacement": "dog"}
    preview = json.loads(client.post("change", {"files": [0, 1, 2], "change": change, "preview": True}).body)
    assert [preview["count"], preview["samples"][0]["after"]] == [2, "a dog, b"]
    assert (client.folder / "b.txt").read_text() == "a cat, b"
    assert json.loads(client.post("change", {"files": [0, 1, 2], "change": change}).body)["changed"] == [1, 2]
    assert (client.folder / "b.txt").read_text() == "a dog, b\n"
    assert json.loads(client.post("move", {"direction": "undo", "steps": 9}).body)["changed"]
    assert [(client.folder / f"{name}.txt").read_text() for name in "abc"] == [f"a cat, {name}" for name in "abc"]


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},  # a name that was bound to this computer
        {"Host": "evil.example:{port}"},
        {"Host": "127.0.0.1.evil.example:{port}"},
        {"Host": "localhost.:{port}"},
        {"Host": ""},
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://localhost:8188"},  # another program of this computer
        {"Origin": "https://127.0.0.1:{port}"},
        {"Origin": "http://127.0.0.1:{port}", "Host": "localhost:{port}"},
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_others_are_refused(client: Client, headers: dict[str, str], method: str) -> None:
    filled = {name: value.format(port=client.port) for name, value in headers.items()}
    body = {"file": 0, "text": "evil", "base": "a cat, a"} if method == "POST" else None
    answer = client.ask("state" if method == "GET" else "edit", method=method, body=body, headers=JSON | filled)
    assert answer.status == 403
    assert b"cat" not in answer.body
    assert (client.folder / "a.txt").read_text() == "a cat, a"


def test_our_own_page_and_tunnels_are_answered(client: Client) -> None:
    for host in (f"127.0.0.1:{client.port}", f"localhost:{client.port}", "localhost:9000"):
        answer = client.post("count", {"file": 0, "text": "x"}, Host=host, Origin=f"http://{host}")
        assert answer.status == 200


@pytest.mark.parametrize("token", ["", "x" * 32, "{token}x", "{token:.31}", "state", "%7Btoken%7D"])
def test_nothing_without_the_token(client: Client, token: str) -> None:
    for path in ("", "state", "thumbnail/0", "editor.js"):
        assert client.ask(f"/{token.format(token=client.token)}/{path}").status == 404
    assert client.ask(f"/{client.token}").status == 404  # its page would look for its parts elsewhere


@pytest.mark.parametrize(
    "path",
    [
        "../secret.txt", "..%2fsecret.txt", "../../etc/passwd", "/etc/passwd", "thumbnail/../../secret.txt",
        "thumbnail/-1", "thumbnail/3", "thumbnail/0x1", "thumbnail/1/2", "view/", "thumbnail/99999999999999999999",
        "page/../run.py", "thumbnail/%D9%A1", "thumbnail/a.png", "index.html", "edit", "changes/../state",
    ],
)  # fmt: skip
def test_no_way_out_of_the_folder(client: Client, path: str) -> None:
    answer = client.ask(path)
    assert answer.status == 404
    assert b"secret" not in answer.body
    assert b"root" not in answer.body


@pytest.mark.parametrize(
    ("name", "body", "status"),
    [
        ("edit", {"file": 3, "text": "x", "base": ""}, 400),
        ("edit", {"file": -1, "text": "x", "base": "a cat, c"}, 400),
        ("edit", {"file": "0", "text": "x", "base": "a cat, a"}, 400),
        ("edit", {"file": True, "text": "x", "base": "a cat, a"}, 400),
        ("edit", {"file": 0, "text": "x\0", "base": "a cat, a"}, 400),
        ("edit", {"file": 0, "text": "x" * (1 << 20), "base": "a cat, a"}, 400),
        ("edit", {"file": 0, "text": "x" * (2 << 20), "base": "a cat, a"}, 400),
        ("edit", {"file": 0, "text": "x", "base": "a cat, a", "path": "/etc/passwd"}, 400),
        ("edit", [], 400),
        ("edit", b"{", 400),
        ("edit", b"[" * 100_000, 400),
        ("edit", b"\xff\xfe", 400),
        ("change", {"files": [0], "change": {"action": "delete"}}, 400),
        ("change", {"files": [0], "change": {"action": "replace", "find": ""}}, 400),
        ("change", {"files": [0], "change": {"action": "add", "tag": " "}}, 400),
        ("move", {"direction": "undo", "steps": 0}, 400),
        ("unknown", {}, 404),
    ],
)
def test_bad_requests_change_nothing(client: Client, name: str, body: Any, status: int) -> None:
    answer = client.post(name, body)
    assert answer.status == status
    assert b"Traceback" not in answer.body
    assert (client.folder / "a.txt").read_text() == "a cat, a"
    assert client.ask("state").status == 200


def test_limits(client: Client) -> None:
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):  # what forms can send
        answer = client.ask("edit", method="POST", body=b"{}", headers={"Content-Type": kind})
        assert answer.status == 415
    for length in (str(MAX_BODY_BYTES + 1), "-1", "x", "9" * 5000):
        with socket.create_connection((LOCALHOST, client.port), timeout=10) as raw:
            head = f"POST /{client.token}/edit HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            raw.sendall(f"{head}Content-Length: {length}\r\n\r\n".encode())
            assert raw.recv(100).split()[1] == b"413"
    for method in ("PUT", "DELETE", "OPTIONS", "HEAD", "TRACE"):
        assert client.ask("state", method=method).status == 501
    assert client.ask("changes?since=x").status == 400


def test_it_listens_on_this_computer_alone(client: Client) -> None:
    server = EditorServer(session=None, thumbnails=None, token="x")  # pyright: ignore[reportArgumentType]
    with open_listener(server, 0) as listener:
        assert listener.server_address[0] == "127.0.0.1"
        listener.allow_reuse_address = False
        with pytest.raises(UserError, match=f"127.0.0.1:{client.port} cannot be used"):
            open_listener(server, client.port)
    assert len({make_token() for _ in range(20)}) == 20
    assert len(make_token()) == 32  # 192 random bits
