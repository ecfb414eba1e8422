"""The caption editor as a user meets it: the real command, 500 images, a real browser, keys and mouse."""

from __future__ import annotations

import random
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from tools.browser import Browser, find_browser, open_browser

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(find_browser() is None, reason="no Chromium here: apt-get install chromium"),
]
COUNT = 500
WORDS = ("red hair", "blue eyes", "smile", "standing", "outdoors", "sky", "tree", "cat", "dog", "window")
LONG = ", ".join(f"a small thing of number {i}" for i in range(30))  # tokens: far over 75
STORE = "(await import(new URL('store.js', location.href))).store"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every 10th image lacks a caption, every 25th has a long one; one is damaged."""
    folder = tmp_path_factory.mktemp("page") / "images"
    folder.mkdir()
    rng = random.Random(0)
    for i in range(COUNT):
        path = folder / f"img{i:03}.jpg"
        Image.new("RGB", (96, 64), tuple(rng.randrange(256) for _ in range(3))).save(path)
        if i % 10:
            path.with_suffix(".txt").write_text(", ".join([f"number {i}", *rng.sample(WORDS, 4)]) + "\n")
        if i % 25 == 1:
            path.with_suffix(".txt").write_text(LONG)
    data = (folder / "img007.jpg").read_bytes()
    (folder / "img007.jpg").write_bytes(data[:-40])
    return folder


@pytest.fixture(scope="module")
def editor(folder: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The command, and the address that it prints."""
    words = [sys.executable, "-m", "sfumato", "dataset", "edit", str(folder), "--cache_dir", str(folder.parent / "c")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        try:
            address = next(found[1] for line in process.stdout if (found := re.match(r"open (http://127\S+)", line)))
            yield process, address
        finally:
            process.kill()


@pytest.fixture(scope="module")
def browser(editor: tuple[subprocess.Popen[str], str], folder: Path) -> Iterator[Browser]:
    with open_browser(folder.parent / "profile") as browser:
        browser.open(editor[1])
        yield browser


@pytest.fixture
def page(browser: Browser) -> Browser:
    """All images are shown, and nothing has been changed, whatever the test before did."""
    browser.resize(1280, 800)
    browser.run("sessionStorage.clear()")
    reload(browser)
    browser.run("fetch('move', {method: 'POST', headers: {'Content-Type': 'application/json'}, "
                "body: JSON.stringify({direction: 'undo', steps: 1000})}).then(answer => answer.ok)")  # fmt: skip
    browser.wait("document.getElementById('undo').disabled")
    return browser


def wait_until_ready(page: Browser) -> None:
    page.wait("document.body.dataset.ready === '' && !document.getElementById('progress').textContent")


def reload(page: Browser) -> None:
    page.run("window.isOld = true")
    page.send("Page.reload")
    page.wait("!window.isOld")
    wait_until_ready(page)


def read_disk(folder: Path) -> dict[str, str]:
    """The caption of each image that has a file, without the line break at its end."""
    return {path.stem: path.read_bytes().decode().removesuffix("\n") for path in sorted(folder.glob("*.txt"))}


def read_page(page: Browser) -> dict[str, str]:
    """The same as the page has it."""
    script = f"(async () => {STORE}.files.filter(f => f.exists).map(f => [f.name.slice(0, -4), f.text]))()"
    return dict(sorted(page.run(script)))


def read_cards(page: Browser) -> dict[str, str]:
    """The captions that can be seen in the grid."""
    script = (
        "[...document.querySelectorAll('.card')].map(c => [c.title.slice(0, -4), c.querySelector('p').textContent])"
    )
    return dict(page.run(script))


def check_shown(page: Browser, folder: Path) -> dict[str, str]:
    """Files on disk are exactly as shown; gives them."""
    disk = read_disk(folder)
    assert read_page(page) == disk
    cards = read_cards(page)
    assert cards
    assert cards == {name: disk.get(name) or "no caption" for name in cards}
    return disk


def count_shown(page: Browser) -> int:
    return int(re.match(r"[\d,]+", page.run("document.getElementById('shown').textContent"))[0])  # pyright: ignore


def choose(page: Browser, fault: str) -> None:
    page.click(f"[data-fault={fault}]")
    page.wait(f"document.querySelector('[data-fault={fault}]').getAttribute('aria-pressed') === 'true'")


def fill(page: Browser, **fields: str) -> None:
    for name, text in fields.items():
        page.click(f"[name={name}]")
        page.type(text)


def apply_change(page: Browser) -> int:
    """How many captions the button says, after it was pressed and everything is written."""
    page.wait("!document.getElementById('apply').disabled")
    count = int(re.findall(r"\d+", page.run("document.getElementById('apply').textContent"))[0])
    steps = page.run(f"(async () => {STORE}.done.length)()")
    page.click("#apply")
    page.wait("!document.querySelector('dialog[open]')")
    assert page.run(f"(async () => {STORE}.done.length)()") == steps + 1
    return count


def test_filter_change_many_undo_and_reload(page: Browser, folder: Path) -> None:
    original = check_shown(page, folder)
    assert len(original) == 450 + sum(i % 10 == 0 and i % 25 == 1 for i in range(COUNT))
    images = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.glob("*.jpg")}

    for fault, count in (("missing", 50), ("long", 20), ("damaged", 1)):
        choose(page, fault)
        assert count_shown(page) == count
    page.press("c")
    page.press("/")
    page.type('"red hair" -smile')
    wanted = {name for name, text in original.items() if "red hair" in text and "smile" not in text}
    page.wait(f"document.getElementById('shown').textContent.startsWith('{len(wanted)} of')")

    page.press("Escape")
    page.press("b")
    fill(page, find="Red Hair", replacement="auburn hair")
    assert apply_change(page) == len(wanted)
    changed = check_shown(page, folder)
    assert count_shown(page) == len(wanted)  # the list stays, so that the result can be seen
    page.click("#again")
    assert count_shown(page) == 0
    assert changed == {n: t.replace("red hair", "auburn hair") if n in wanted else t for n, t in original.items()}

    page.press("c")
    page.press("b")
    page.click("[value=add] + span")
    fill(page, tag="sks")
    page.click("[name=at_start]")
    assert apply_change(page) == COUNT
    tagged = check_shown(page, folder)
    assert tagged == {f"img{i:03}": "sks" for i in range(0, COUNT, 10)} | {n: f"sks, {t}" for n, t in changed.items()}

    page.press("z")
    page.wait("document.querySelectorAll('.toast').length && !document.getElementById('redo').disabled")
    assert check_shown(page, folder) == changed
    reload(page)
    assert check_shown(page, folder) == changed  # and the history is still there
    page.click("#undo")
    page.wait("document.getElementById('undo').disabled")
    assert check_shown(page, folder) == original
    page.press("Z", shift=True)
    page.press("Z", shift=True)
    page.wait("document.getElementById('redo').disabled")
    assert check_shown(page, folder) == tagged
    page.click("#history-open")
    page.click("#history button:last-child")  # all the way back
    page.wait("document.getElementById('undo').disabled")
    assert check_shown(page, folder) == original
    assert {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.glob("*.jpg")} == images
    assert {path.suffix for path in folder.iterdir()} == {".jpg", ".txt"}
    assert not page.list_faults()


def test_captions_are_written_with_keys(page: Browser, folder: Path) -> None:
    choose(page, "missing")
    page.press("Home")
    page.press("e")
    for i in range(3):
        page.type(f"fresh {i}")
        page.press("Enter", ctrl=True)
        name = f"img{10 * (i + 1):03}.jpg"
        page.wait(f"document.getElementById('name').textContent === '{name}'")
        page.wait("document.activeElement.id === 'caption'")
    page.press("Escape")
    assert [(folder / f"img{i:03}.txt").read_text() for i in (0, 10, 20)] == ["fresh 0\n", "fresh 1\n", "fresh 2\n"]
    check_shown(page, folder)
    page.press("k")
    page.wait("document.getElementById('caption').value === 'fresh 2'")
    page.press("t")
    page.type("one more")
    page.press("Enter")
    page.wait("document.getElementById('caption').value === 'fresh 2, one more'")
    page.press("Escape")
    page.click("#own-tags button")
    page.wait("document.getElementById('caption').value === 'one more'")
    assert (folder / "img020.txt").read_text() == "one more\n"
    page.press("c")
    check_shown(page, folder)
    for _ in range(5):
        page.press("z")
    page.wait("document.getElementById('undo').disabled")
    assert not any((folder / f"img{i:03}.txt").exists() for i in (0, 10, 20))


def test_tokens_beyond_the_limit_are_marked(page: Browser) -> None:
    choose(page, "long")
    page.press("Home")
    page.wait("document.querySelector('#mirror mark').textContent.length > 100")
    page.wait("document.querySelector('#tokens .over')")
    counted = page.run("document.getElementById('tokens').textContent")
    tokens = 30 * 5 + 10 + 20 * 2 + 29  # CLIP reads a word, each digit and each comma as a token
    assert counted == f"{tokens} of 75 tokens, {tokens - 75} are cut"
    page.press("e")
    page.run("document.getElementById('caption').select()")
    page.type("a cat")
    page.wait("document.getElementById('tokens').textContent === '2 of 75 tokens'")
    page.wait("!document.querySelector('#mirror mark').textContent")
    page.press("Escape")
    page.wait("!document.getElementById('undo').disabled")
    page.press("z")
    page.wait("document.getElementById('undo').disabled")
    page.press("c")


def test_what_another_program_wrote_is_not_lost(page: Browser, folder: Path) -> None:
    file = folder / "img002.txt"
    before = file.read_text()
    page.press("Home")
    page.press("j")
    page.press("j")
    page.wait("document.getElementById('name').textContent === 'img002.jpg'")
    page.press("e")
    page.type(" mine")
    file.write_text("theirs\n")
    page.press("Enter", ctrl=True)
    page.wait("!document.getElementById('conflict').hidden")
    assert file.read_text() == "theirs\n"
    assert page.run("document.getElementById('theirs').textContent") == "theirs"
    reload(page)  # what was written survives
    assert page.run("document.getElementById('caption').value") == before.strip() + " mine"
    page.wait("!document.getElementById('conflict').hidden")
    page.click("#take-theirs")
    page.wait("document.getElementById('caption').value === 'theirs' && document.getElementById('conflict').hidden")
    page.press("e")
    page.type(" and mine")
    file.write_text(before)
    page.press("Escape")
    page.wait("!document.getElementById('conflict').hidden")
    page.click("#keep-mine")
    page.wait("!document.getElementById('undo').disabled")  # it is written, and the page knows
    assert page.run("document.getElementById('conflict').hidden")
    assert file.read_text() == "theirs and mine\n"
    page.press("z")
    page.wait("document.getElementById('undo').disabled")
    assert file.read_text() == before
    check_shown(page, folder)
    assert not page.list_faults()


def test_on_a_phone(page: Browser, folder: Path) -> None:
    page.resize(390, 844, mobile=True)
    page.wait("getComputedStyle(document.getElementById('detail')).visibility === 'hidden'")
    assert page.run("document.documentElement.scrollWidth") == 390
    assert len(set(page.run("[...document.querySelectorAll('.card')].map(card => card.style.left)"))) == 3
    page.click(".card[data-place='4']")
    page.wait("getComputedStyle(document.getElementById('detail')).visibility === 'visible'")
    page.wait("document.getElementById('name').textContent === 'img004.jpg'")
    page.wait("document.getElementById('view').naturalWidth === 96")
    page.click("#caption")
    page.type(", on a phone")
    page.click("#detail-close")
    page.wait("getComputedStyle(document.getElementById('detail')).visibility === 'hidden'")
    assert (folder / "img004.txt").read_text().count(", on a phone") == 1
    page.click("#undo")
    page.wait("document.getElementById('undo').disabled")


def test_ctrl_c_ends_it(page: Browser, editor: tuple[subprocess.Popen[str], str]) -> None:
    """The last test of this file."""
    process, _ = editor
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 0
    assert process.stdout
    assert process.stderr
    assert process.stdout.read().endswith("\ncaptions changed: 0\n")
    assert not process.stderr.read()
    page.press("Home")
    page.wait("!document.getElementById('lost').hidden")
