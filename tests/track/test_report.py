"""The page about a run: it shows what the run's files say, to the number, and nothing private."""

from __future__ import annotations

import json
import logging
import re
import struct
import zlib

import pytest
from PIL import Image

from sfumato.cli.main import main
from sfumato.errors import UserError
from sfumato.track.charts.chart import format_number
from sfumato.track.metrics_logger import MetricsLogger
from sfumato.track.progress import Progress, Speed
from sfumato.track.report import Report, read_earlier, rebuild_report
from sfumato.track.report_facts import EMPTY_DESCRIPTION, WarningCollector, read_description, stop_collecting
from sfumato.track.report_page import render_page
from sfumato.track.report_samples import MAX_CHARACTERS, make_thumbnail
from track.readings import Late
from track.report_pages import (
    NO_SAMPLES,
    PageParser,
    make_description,
    open_report,
    read_page,
    write_lines,
    write_sample,
)

EVIL = "<script>alert('x')</script> & \"quotes\""


def test_the_page_shows_the_metrics(tmp_path):
    report = open_report(tmp_path)
    write_lines(tmp_path, range(1, 41), grad_norm=0.375)
    report.advance(40, Speed(seconds=0.5, images=3, peak_memory=7_100_000_000))
    report.close(None, total=40)
    page = read_page(tmp_path)
    for number in (
        format_number(1 / 40),
        format_number(2 / 40),
        format_number(40e-4),
        "0.375",
        "finished",
        "Toy model",
        "seed 77",
        "steps/s, 6 images/s",
        "7.1 \nGB",
    ):
        assert number in page.text
    assert "epoch\n4 \nof 4\n" in page.text
    (loss, average, *_) = [attributes for tag, attributes in page.tags if tag == "polyline"]
    assert (loss["data-name"], average["data-name"]) == ("each step", "average")
    assert len(loss["points"].split()) == 40


def test_nothing_is_fetched(tmp_path):
    write_lines(tmp_path, range(1, 4))
    write_sample(tmp_path, "cat_000002_00_99990101000000.png", "a cat")
    content = rebuild_report(tmp_path, None).read_text()
    assert "http" not in content
    sources = [attributes.get("src") or attributes.get("href") for _, attributes in PageParser(content).tags]
    assert {source.partition(":")[0] for source in sources if source} <= {
        "data",
        "sample/cat_000002_00_99990101000000.png",
    }


def test_everything_from_outside_is_escaped(tmp_path):
    write_lines(tmp_path, range(1, 4), **{EVIL: 1.0, f"lr/{EVIL}": 2.0})
    subset = {"folder": EVIL, "images": 1, "repeats": 2, "samples": 2, "is_reg": False}
    data = [{"resolution": EVIL, "batch_size": 1, "subsets": [subset], "buckets": [[64, 64, 1], [64, 96, 1]]}]
    report = open_report(
        tmp_path, model=EVIL, method=EVIL, checkpoint=EVIL, device=EVIL, options=[[EVIL, EVIL, EVIL]], data=data,
        notes=[EVIL], trains=[[EVIL, 1, 2, 0.1]],
    )  # fmt: skip
    report.warnings.counts[EVIL], report.warnings.first[EVIL] = 1, 0
    write_sample(tmp_path, "cat_000002_00_99990101000000.png", EVIL)
    report.advance(3, Speed(seconds=1.0))
    report.close(UserError(EVIL, code="evil-text"), total=40)
    content = (tmp_path / "cat.report.html").read_text()
    assert "<script>alert" not in content
    page = read_page(tmp_path)
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert page.text.count(EVIL) >= 12


def test_a_long_run_with_many_samples_stays_small(tmp_path):
    write_lines(tmp_path, range(1, 20_001), grad_norm=1.0)
    for number in range(3):
        for step in range(1000, 20_001, 1000):
            write_sample(tmp_path, f"cat_{step:06d}_{number:02d}_99990101000000.png", "a cat", (256, 256))
    page = rebuild_report(tmp_path, None)
    assert page.stat().st_size < MAX_CHARACTERS + 500_000
    images = [attributes for tag, attributes in PageParser(page.read_text()).tags if tag == "img"]
    assert 6 <= len(images) < 60
    steps = [int(re.findall(r"step ([\d,]+)", image["alt"])[0].replace(",", "")) for image in images]
    assert {1000, 20_000} <= set(steps)


def test_samples_of_other_runs_are_skipped(tmp_path):
    """An older run of the same name, one that went further, other names; an epoch's label counts in epochs."""
    write_lines(tmp_path, range(1, 21))
    report = open_report(tmp_path)
    kept = ["cat_e000002_00_99990101000000.png", "cat_000010_00_99990101000000_7.png"]
    others = [
        "cat_000010_00_20000101000000.png",
        "cat_000030_00_99990101000000.png",
        "cats_000010_00_99990101000000.png",
    ]
    for file in [*kept, *others]:
        write_sample(tmp_path, file, "a cat")
    (tmp_path / "sample" / "cat_000005_00_99990101000000.png").write_text("torn")
    report.advance(20, Speed(seconds=1.0))
    report.close(None, total=40)
    links = [attributes["href"] for tag, attributes in read_page(tmp_path).tags if tag == "a"]
    assert links == [f"sample/{kept[1]}", f"sample/{kept[0]}"]
    assert "stopped" in read_page(tmp_path).text


def test_a_resumed_run_continues_the_report(tmp_path):
    report = open_report(tmp_path)
    write_lines(tmp_path, range(1, 21))
    report.warnings.counts["something was odd"], report.warnings.first["something was odd"] = 2, 5
    report.advance(20, Speed(seconds=1.0))
    report.close(None, total=40)
    again = open_report(tmp_path, start=20)
    write_lines(tmp_path, range(21, 41))
    again.advance(40, Speed(seconds=1.0))
    again.close(None, total=40)
    page = read_page(tmp_path)
    for text in ("finished", "at step 20", "something was odd", "after step 5, 2 times"):
        assert text in page.text
    loss = next(attributes for tag, attributes in page.tags if tag == "polyline")
    assert len(loss["points"].split()) == 40
    fresh = open_report(tmp_path)
    fresh.close(None, total=40)
    assert "something was odd" not in read_page(tmp_path).text


def test_it_is_written_rarely(tmp_path, monkeypatch):
    now, writings = [0.0], []
    report = Report(tmp_path, make_description(), start=0, warnings=WarningCollector(), clock=lambda: now[0])

    def slow(*_: object) -> None:
        writings.append(now[0])
        now[0] += 2.0

    monkeypatch.setattr("sfumato.track.report.write_page", slow)
    for step in range(1, 2001):
        now[0] += 1.0
        report.advance(step, Speed(seconds=1.0))
        if step % 10 == 0:
            report.publish()
    assert 2.0 * len(writings) <= 0.05 * now[0] + 2.0
    assert len(writings) > 30
    report.close(None, total=2000)
    assert writings[-1] == now[0] - 2.0


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ZeroDivisionError()])
def test_after_any_error_the_next_update_is_tried(tmp_path, warnings, monkeypatch, error):
    """The page must not say "running" for ever."""

    def fail(*_: object) -> None:
        raise error

    progress = Progress(2, 0, plain=True, visible=False)
    with MetricsLogger([], progress, window=1, report=open_report(tmp_path)) as metrics:
        with monkeypatch.context() as broken:
            broken.setattr("sfumato.track.report.write_page", fail)
            for step in (1, 2):
                metrics.log_step(step, Late(1.0), {})
                metrics.publish()
        assert not (tmp_path / "cat.report.html").exists()
    assert "finished" in read_page(tmp_path).text
    (line,) = warnings()
    assert "writing the report" in line


@pytest.mark.parametrize("side", [60_000, 12_000])
def test_a_huge_image_among_the_samples_is_skipped(tmp_path, side):
    """The larger one Pillow refuses to open; of the smaller one no pixel is read, half a gigabyte."""
    report = open_report(tmp_path)
    (tmp_path / "sample").mkdir()
    bomb = b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    content = bomb + png_chunk(b"IDAT", zlib.compress(b"")) + png_chunk(b"IEND", b"")
    path = tmp_path / "sample" / "cat_000001_00_99990101000000.png"
    path.write_bytes(content)
    with pytest.raises((ValueError, Image.DecompressionBombError), match="pixels"):
        make_thumbnail(path)
    report.advance(1, Speed(seconds=1.0))
    report.close(None, total=1)
    assert "finished" in read_page(tmp_path).text


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


@pytest.mark.parametrize(
    "change",
    [
        {"sessions": [{}]}, {"sessions": [{"start": 0}]}, {"sessions": [7]}, {"warnings": ["x"]},
        {"sessions": [{"started": "", "updated": 1, "start": 0, "step": 1, "seconds_per_step": 1, "state": "running"}]},
    ],
)  # fmt: skip
def test_a_damaged_description_is_no_earlier_one(tmp_path, change):
    report = open_report(tmp_path)
    report.advance(1, Speed(seconds=1.0))
    report.close(None, total=4)
    path = tmp_path / "cat.report.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError) as caught:
        read_description(path)
    assert caught.value.code == "run-description-invalid"
    assert read_earlier(tmp_path, "cat") == {}


def test_warnings_are_kept_without_paths(tmp_path):
    report = open_report(tmp_path)
    for _ in range(3):
        logging.getLogger("sfumato.some").warning("cannot read %s", "/home/canary/private/a.png")
    logging.getLogger("sfumato.some").info("nothing to see")
    report.close(UserError("no room in /home/canary/private", code="no-room"), total=4)
    logging.getLogger("sfumato.some").warning("too late")
    content = (tmp_path / "cat.report.html").read_text() + (tmp_path / "cat.report.json").read_text()
    assert "cannot read a.png" in content
    assert "3 times" in content
    assert "ended by an error" in content
    assert not re.search("canary|nothing to see|too late", content)


def test_a_killed_run_becomes_silent(tmp_path):
    report = open_report(tmp_path)
    write_lines(tmp_path, range(1, 4))
    report.advance(3, Speed(seconds=2.0))
    for seconds, state in ((1700, "running"), (1900, "silent")):
        content = render_page(report.description, report.curves, NO_SAMPLES, now=report.session["updated"] + seconds)
        assert f'data-state="{state}"' in content
    report.session["seconds_per_step"] = 60.0
    content = render_page(report.description, report.curves, NO_SAMPLES, now=report.session["updated"] + 1900)
    assert 'data-state="running"' in content
    stop_collecting(report.warnings)


def test_the_command_rebuilds_it(tmp_path, capsys):
    report = open_report(tmp_path)
    write_lines(tmp_path, range(1, 5))
    report.advance(4, Speed(seconds=1.0))
    report.close(None, total=40)
    before = (tmp_path / "cat.report.html").read_text()
    (tmp_path / "cat.report.html").unlink()
    assert main(["report", str(tmp_path)]) == 0
    assert (tmp_path / "cat.report.html").read_text() == before
    assert "cat.report.html" in capsys.readouterr().out


def test_the_command_without_a_run(tmp_path, capsys):
    assert main(["report", str(tmp_path)]) == 2
    write_lines(tmp_path, range(1, 3), name="cat")
    write_lines(tmp_path, range(1, 3), name="dog")
    assert main(["report", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "--name" in error
    assert "cat, dog" in error
    assert main(["report", str(tmp_path), "--name", "dog"]) == 0
    assert (tmp_path / "dog.report.html").is_file()
    (tmp_path / "dog.report.json").write_text('{"name": 3}')
    with pytest.raises(UserError) as error:
        rebuild_report(tmp_path, "dog")
    assert error.value.code == "run-description-invalid"


def damage_report(folder, **changes):
    """The error of a description with these entries changed."""
    write_lines(folder, range(1, 3), name="dog")
    good = {**EMPTY_DESCRIPTION, "name": "dog", "sessions": [SESSION]}
    (folder / "dog.report.json").write_text(json.dumps(good))
    rebuild_report(folder, "dog")
    (folder / "dog.report.json").write_text(json.dumps({**good, **changes}))
    with pytest.raises(UserError) as error:
        rebuild_report(folder, "dog")
    return error.value


SESSION = {"started": 1e9, "updated": 1e9, "start": 0, "step": 2, "seconds_per_step": 0.5, "state": "finished"}


@pytest.mark.parametrize(
    "changes",
    [
        {"sessions": [{}]},
        {"sessions": [{**SESSION, "updated": 1e300}]},
        {"sessions": [{**SESSION, "step": -1}]},
        {"sessions": [{**SESSION, "seconds_per_step": float("nan")}]},
        {"trained_parts": [["unet", 1]]},
        {"trained_parts": [["unet", 1, 1, 10**400]]},
        {"options": [["a"]]},
        {"data": [{"resolution": 3}]},
        {"warnings": [{"text": None}]},
        {"clip": "1"},
        {"notes": "a"},
        {"versions": []},
        {"total": 10**400},
    ],
)
def test_a_damaged_description_is_one_line(tmp_path, changes):
    error = damage_report(tmp_path, **changes)
    assert error.code == "run-description-invalid"
    assert next(iter(changes)) in error.what
    assert str(tmp_path / "dog.report.json") in error.what


def test_a_description_does_not_say_where_the_page_is_written(tmp_path):
    write_lines(tmp_path, range(1, 3), name="dog")
    (tmp_path / "dog.report.json").write_text(json.dumps({**EMPTY_DESCRIPTION, "name": "../other/\ud800"}))
    assert rebuild_report(tmp_path, "dog") == tmp_path / "dog.report.html"
    assert not (tmp_path.parent / "other").exists()
