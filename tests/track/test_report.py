"""The page about a run: it says what the files say, to the number, and nothing private."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from sfumato.cli.main import main
from sfumato.errors import UserError
from sfumato.track.report import Report, remake
from sfumato.track.report_curves import Curves, by_level, thinned
from sfumato.track.report_draw import shown, ticks
from sfumato.track.report_facts import EMPTY, Remembered, forget, remember_warnings
from sfumato.track.report_page import page
from sfumato.track.report_samples import BUDGET, Grid

VOID = {"meta", "link", "img", "br", "hr", "input"}
NO_PICTURES = Grid(steps=(), numbers=(), cells={})
EVIL = "<script>alert('x')</script> & \"quotes\""


class Checked(HTMLParser):
    """Fails on a tag that is not closed in its turn; keeps the text, by tag, and every attribute."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.texts: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.texts.append(data)

    @property
    def text(self) -> str:
        return "\n".join(self.texts)


def write_lines(folder: Path, steps: range, *, name: str = "cat", **more: float) -> None:
    with (folder / f"{name}.run.jsonl").open("a") as file:
        for step in steps:
            row = {"step": step, "loss/current": 1 / step, "loss/average": 2 / step, "lr/unet": step * 1e-4, **more}
            row |= {"timesteps": [step % 1000 + 0.5], "loss/samples": [1 / step]}
            file.write(json.dumps(row) + "\n")


def described(**changes: object) -> dict[str, object]:
    return {**EMPTY, "name": "cat", "model": "Toy model", "total": 40, "steps_per_epoch": 10, "seed": 77, **changes}


def opened(folder: Path, *, start: int = 0, **changes: object) -> Report:
    return Report(folder, described(**changes), start=start, warnings=remember_warnings())


def read(folder: Path, name: str = "cat") -> Checked:
    return Checked((folder / f"{name}.report.html").read_text(encoding="utf-8"))


def picture(folder: Path, file: str, prompt: str, size: tuple[int, int] = (64, 64)) -> None:
    (folder / "sample").mkdir(exist_ok=True)
    text = PngInfo()
    text.add_text("prompt", prompt)
    noise = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / "sample" / file, pnginfo=text)


# ---------------------------------------------------------------- the page


def test_the_page_says_what_the_journal_says(tmp_path):
    report = opened(tmp_path)
    write_lines(tmp_path, range(1, 41), grad_norm=0.375)
    report.advance(40, 0.5)
    report.close(None, total=40)
    page = read(tmp_path)
    for number in (shown(1 / 40), shown(2 / 40), shown(40e-4), "0.375", "finished", "Toy model", "seed 77"):
        assert number in page.text
    assert "epoch\n4 \nof 4\n" in page.text
    (loss, average, *_) = [attributes for tag, attributes in page.tags if tag == "polyline"]
    assert (loss["data-name"], average["data-name"]) == ("each step", "average")
    assert len(loss["points"].split()) == 40


def test_nothing_is_fetched(tmp_path):
    write_lines(tmp_path, range(1, 4))
    picture(tmp_path, "cat_000002_00_99990101000000.png", "a cat")
    content = remake(tmp_path, None).read_text()
    assert "http" not in content
    sources = [attributes.get("src") or attributes.get("href") for _, attributes in Checked(content).tags]
    assert {source.partition(":")[0] for source in sources if source} <= {
        "data",
        "sample/cat_000002_00_99990101000000.png",
    }


def test_everything_from_outside_is_escaped(tmp_path):
    write_lines(tmp_path, range(1, 4), **{EVIL: 1.0, f"lr/{EVIL}": 2.0})
    subset = {"folder": EVIL, "images": 1, "repeats": 2, "samples": 2, "is_reg": False}
    data = [{"resolution": EVIL, "batch_size": 1, "subsets": [subset], "buckets": [[64, 64, 1], [64, 96, 1]]}]
    report = opened(
        tmp_path, model=EVIL, method=EVIL, checkpoint=EVIL, device=EVIL, options=[[EVIL, EVIL, EVIL]], data=data,
        notes=[EVIL], trains=[[EVIL, 1, 2, 0.1]],
    )  # fmt: skip
    report.warnings.counts[EVIL], report.warnings.first[EVIL] = 1, 0
    picture(tmp_path, "cat_000002_00_99990101000000.png", EVIL)
    report.advance(3, 1.0)
    report.close(UserError(EVIL), total=40)
    content = (tmp_path / "cat.report.html").read_text()
    assert "<script>alert" not in content
    page = read(tmp_path)
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert page.text.count(EVIL) >= 12


def test_a_torn_last_line_and_rubbish_are_passed_over(tmp_path):
    write_lines(tmp_path, range(1, 4))
    with (tmp_path / "cat.run.jsonl").open("a") as file:
        file.write('[1]\n{"step": "4"}\nnonsense\n{"step": 5, "timesteps": 3}\n{"step": 6, "loss/curr')
    curves = Curves(tmp_path / "cat.run.jsonl")
    curves.read()
    assert list(curves.steps) == [1, 2, 3]
    assert "0.3333" in Checked(remake(tmp_path, None).read_text()).text


def test_lines_are_read_once_and_a_half_line_when_it_is_whole(tmp_path):
    path = tmp_path / "cat.run.jsonl"
    curves = Curves(path)
    curves.read()
    assert curves.last == 0
    write_lines(tmp_path, range(1, 3), grad_norm=1.0)
    with path.open("a") as file:
        file.write('{"step": 3, "loss/cur')
    curves.read()
    assert curves.last == 2
    with path.open("a") as file:
        file.write('rent": 0.25, "late": 4.0}\n{"step": 4, "loss/current": null}\n')
    curves.read()
    assert [each.tolist() for each in curves.xy("loss/current")] == [[1, 2, 3], [1, 0.5, 0.25]]
    assert [each.tolist() for each in curves.xy("late")] == [[3], [4]]
    assert curves.lost() == [4]
    path.write_text("")  # another run under the same name
    curves.read()
    assert curves.last == 0


def test_a_long_run_with_many_previews_stays_small(tmp_path):
    write_lines(tmp_path, range(1, 20_001), grad_norm=1.0)
    for number in range(3):
        for step in range(1000, 20_001, 1000):
            picture(tmp_path, f"cat_{step:06d}_{number:02d}_99990101000000.png", "a cat", (256, 256))
    page = remake(tmp_path, None)
    assert page.stat().st_size < BUDGET + 500_000
    images = [attributes for tag, attributes in Checked(page.read_text()).tags if tag == "img"]
    assert 6 <= len(images) < 60
    steps = [int(re.findall(r"step ([\d,]+)", each["alt"])[0].replace(",", "")) for each in images]
    assert {1000, 20_000} <= set(steps)


def test_previews_of_other_runs_stay_out(tmp_path):
    """An older run of the same name, one that went further, other names; an epoch's label counts in epochs."""
    write_lines(tmp_path, range(1, 21))
    report = opened(tmp_path)
    kept = ["cat_e000002_00_99990101000000.png", "cat_000010_00_99990101000000_7.png"]
    others = [
        "cat_000010_00_20000101000000.png",
        "cat_000030_00_99990101000000.png",
        "cats_000010_00_99990101000000.png",
    ]
    for file in [*kept, *others]:
        picture(tmp_path, file, "a cat")
    (tmp_path / "sample" / "cat_000005_00_99990101000000.png").write_text("torn")
    report.advance(20, 1.0)
    report.close(None, total=40)
    links = [attributes["href"] for tag, attributes in read(tmp_path).tags if tag == "a"]
    assert links == [f"sample/{kept[1]}", f"sample/{kept[0]}"]
    assert "stopped" in read(tmp_path).text


# ---------------------------------------------------------------- during the run


def test_a_resumed_run_goes_on_in_the_same_report(tmp_path):
    report = opened(tmp_path)
    write_lines(tmp_path, range(1, 21))
    report.warnings.counts["something was odd"], report.warnings.first["something was odd"] = 2, 5
    report.advance(20, 1.0)
    report.close(None, total=40)
    again = opened(tmp_path, start=20)
    write_lines(tmp_path, range(21, 41))
    again.advance(40, 1.0)
    again.close(None, total=40)
    page = read(tmp_path)
    for text in ("finished", "at step 20", "something was odd", "after step 5, 2 times"):
        assert text in page.text
    loss = next(attributes for tag, attributes in page.tags if tag == "polyline")
    assert len(loss["points"].split()) == 40
    fresh = opened(tmp_path)
    fresh.close(None, total=40)
    assert "something was odd" not in read(tmp_path).text


def test_it_is_written_rarely_and_costs_little(tmp_path, monkeypatch):
    now, writings = [0.0], []
    report = Report(tmp_path, described(), start=0, warnings=Remembered(), clock=lambda: now[0])

    def slow(*_: object) -> None:
        writings.append(now[0])
        now[0] += 2.0

    monkeypatch.setattr("sfumato.track.report.write_page", slow)
    for step in range(1, 2001):
        now[0] += 1.0
        report.advance(step, 1.0)
        if step % 10 == 0:
            report.publish()
    assert 2.0 * len(writings) <= 0.05 * now[0] + 2.0
    assert len(writings) > 30
    report.close(None, total=2000)
    assert writings[-1] == now[0] - 2.0


def test_a_full_disk_costs_the_report_only(tmp_path, messages, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    report = opened(tmp_path)
    monkeypatch.setattr("sfumato.track.report.write_page", full)
    for step in (1, 2):
        report.advance(step, 1.0)
        report.publish()
    report.close(None, total=2)
    assert [record.getMessage() for record in messages] == [
        "the report cannot be written any more: [Errno 28] No space left on device"
    ]


def test_warnings_are_kept_without_paths(tmp_path):
    import logging

    report = opened(tmp_path)
    for _ in range(3):
        logging.getLogger("sfumato.some").warning("cannot read %s", "/home/canary/private/a.png")
    logging.getLogger("sfumato.some").info("nothing to see")
    report.close(UserError("no room in /home/canary/private"), total=4)
    logging.getLogger("sfumato.some").warning("too late")
    content = (tmp_path / "cat.report.html").read_text() + (tmp_path / "cat.report.json").read_text()
    assert "cannot read a.png" in content
    assert "3 times" in content
    assert "ended by an error" in content
    assert not re.search("canary|nothing to see|too late", content)


def test_a_run_that_was_killed_is_told_from_one_that_goes_on(tmp_path):
    report = opened(tmp_path)
    write_lines(tmp_path, range(1, 4))
    report.advance(3, 2.0)
    for seconds, state in ((1700, "running"), (1900, "silent")):
        content = page(report.description, report.curves, NO_PICTURES, now=report.session["updated"] + seconds)
        assert f'data-state="{state}"' in content
    report.session["seconds_per_step"] = 60.0
    content = page(report.description, report.curves, NO_PICTURES, now=report.session["updated"] + 1900)
    assert 'data-state="running"' in content
    forget(report.warnings)


# ---------------------------------------------------------------- sfumato report


def test_the_command_makes_it_again(tmp_path, capsys):
    report = opened(tmp_path)
    write_lines(tmp_path, range(1, 5))
    report.advance(4, 1.0)
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
    assert "--name with one of cat, dog" in capsys.readouterr().err
    assert main(["report", str(tmp_path), "--name", "dog"]) == 0
    assert (tmp_path / "dog.report.html").is_file()
    (tmp_path / "dog.report.json").write_text('{"name": 3}')
    with pytest.raises(UserError, match="does not describe a run"):
        remake(tmp_path, "dog")


# ---------------------------------------------------------------- numbers


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=3000), st.integers(10, 400))
def test_thinning_keeps_the_extremes(values, most):
    y = np.array(values)
    x, thin = thinned(np.arange(len(y), dtype=float), y, most)
    assert len(thin) <= most or len(y) <= most
    assert (thin.min(), thin.max()) == (y.min(), y.max())
    assert (np.diff(x) > 0).all()
    assert (y[x.astype(int)] == thin).all()


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_few_and_within(low, width):
    found = ticks(low, low + width, most=6)
    assert 1 <= len(found) <= 6
    assert all(low - 1e-6 * abs(low) - 1e-9 * width <= tick <= low + width + 1e-6 * abs(low) + width for tick in found)


def test_loss_by_noise_level_is_the_mean_of_the_samples(tmp_path):
    rng = np.random.default_rng(0)
    rows = [
        {"step": step, "timesteps": rng.uniform(0, 1000, 4).tolist(), "loss/samples": rng.uniform(0, 1, 4).tolist()}
        for step in range(1, 91)
    ]
    (tmp_path / "cat.run.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    curves = Curves(tmp_path / "cat.run.jsonl")
    curves.read()
    for i, level in enumerate(by_level(curves)):
        for part, value, count in (
            (rows[:30], level.early, level.early_count),
            (rows[60:], level.late, level.late_count),
        ):
            pairs = [pair for row in part for pair in zip(row["timesteps"], row["loss/samples"], strict=True)]
            losses = [loss for t, loss in pairs if int(t // 100) == i]
            assert count == len(losses)
            assert value == pytest.approx(sum(losses) / len(losses))
