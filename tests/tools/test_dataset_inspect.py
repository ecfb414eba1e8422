"""`sfumato dataset inspect` and --debug_dataset: what they find, what the page holds, and that nothing is changed."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import tarfile
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sfumato.cli.main import main
from sfumato.data.find import verify_images

LONG = ", ".join(f"tag{i}" for i in range(60))
TOKENS = 10 * 2 + 50 * 3 + 59  # CLIP reads a word, each digit and each comma as a token


def make_image(size: tuple[int, int], seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))


@pytest.fixture
def folder(tmp_path) -> Path:
    """Six good images in two shapes, one without a caption, one with a long one; a damaged image, and no image."""
    folder = tmp_path / "images" / "3_<b>cat"
    folder.mkdir(parents=True)
    for i in range(6):
        make_image((96, 32) if i % 2 else (64, 64), i).save(folder / f"img{i}.png")
        (folder / f"img{i}.txt").write_text(f"a cat, tag{i % 2}, <i>striped</i> & small")
    (folder / "img3.txt").write_text(LONG)
    (folder / "img5.txt").unlink()
    (folder / "img4.caption").write_text("unused")
    (folder / "text.png").write_text("not an image")
    make_image((64, 64), 9).save(folder / "torn.png")
    data = bytearray((folder / "torn.png").read_bytes())
    data[3000:3100] = bytes(100)
    (folder / "torn.png").write_bytes(data)
    (folder / "torn.txt").write_text("a cat")
    return folder.parent


def tree(folder: Path) -> dict[str, tuple[str, int]]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns) for path in files}


def words(folder: Path, tmp_path: Path, *more: object) -> list[str]:
    given = ("--resolution", 64, "--enable_bucket", "--min_bucket_reso", 32, "--bucket_reso_steps", 32)
    cache = ("--cache_dir", tmp_path / "cache", "--caption_extension", ".txt", "--console_log_level", "ERROR")
    return [str(each) for each in ("dataset", "inspect", folder, *given, *cache, *more)]


def value(printed: str, name: str) -> str:
    found = re.search(rf"^  {re.escape(name)} +(.*)$", printed, re.MULTILINE)
    assert found, printed
    return found[1]


def test_everything_is_found_and_reported(folder, tmp_path, capsys, codes):
    assert main(words(folder, tmp_path)) == 2
    printed, faults = capsys.readouterr()
    assert value(printed, "images") == "7, each 3 times, 21 samples per epoch"
    assert re.search(r"^  not images +1\n    text.png ", printed, re.MULTILINE)
    assert re.search(r"^  damaged +1\n    torn.png ", printed, re.MULTILINE)
    assert value(printed, "caption files beside them") == "6 .txt, 1 .caption"
    assert value(printed, "tokens (CLIP)") == f"1 of 7 captions are cut; the longest caption has {TOKENS} of 75"
    assert value(printed, "tags").startswith("63 different: a cat 5, tag0 4, <i>striped</i> & small 4, tag1 2")
    assert value(printed, "captions from class_tokens") == "1: <b>cat"
    assert len(re.findall(r"^  bucket ", printed, re.MULTILINE)) == 2
    assert "text.png" in faults
    assert "torn.png" in faults
    assert "image-not-decodable" in codes


@pytest.mark.parametrize("source", ["folder", "archive", "metadata", "masks"])
def test_every_bad_file_of_any_source_is_named(source, tmp_path, capsys):
    """Thirty of them, more than training reports one by one."""
    files = {f"{i:02}.png": b"no image" if i % 3 else b"" for i in range(30)}
    good = make_image((64, 64), 1)
    write = tmp_path / "a" if source != "masks" else tmp_path / "masks"
    for folder in {write, tmp_path / "a"}:
        folder.mkdir()
        good.save(folder / "good.png")
    for name, content in files.items():
        (write / name).write_bytes(content)
        good.save(tmp_path / "a" / name) if source == "masks" else None
    place = f"image_dir = '{tmp_path}/a'"
    if source == "archive":
        with tarfile.open(tmp_path / "a.tar", "w") as archive:
            archive.add(tmp_path / "a", "x")
        place = f"image_dir = '{tmp_path}/a.tar'"
    elif source == "metadata":
        (tmp_path / "m.json").write_text(json.dumps({name: {"caption": "x"} for name in (*files, "good.png")}))
        place += f"\nmetadata_file = '{tmp_path}/m.json'"
    elif source == "masks":
        place += f"\nconditioning_data_dir = '{tmp_path}/masks'"
    kind = "" if source == "metadata" else "class_tokens = 'cat'"
    (tmp_path / "d.toml").write_text(f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\n{place}\n{kind}\n")
    options = ["--cache_dir", str(tmp_path / "cache"), *(["--masked_loss"] if source == "masks" else [])]
    page = tmp_path / "page.html"
    assert main(["dataset", "inspect", str(tmp_path / "d.toml"), "--html", str(page), *options]) == 2
    printed, faults = capsys.readouterr()
    named = re.search(r"^  not images +30\n((?:    .*\n)+)", printed, re.MULTILINE)
    assert named
    assert [name in line for name, line in zip(files, named[1].splitlines(), strict=True)] == [True] * 30
    assert all(name in page.read_text() for name in files)
    assert "10 more" in faults


def test_a_sound_dataset_ends_well(folder, tmp_path, capsys):
    for name in ("text.png", "torn.png", "torn.txt", "img4.caption"):
        (folder / "3_<b>cat" / name).unlink()
    assert main(words(folder, tmp_path)) == 0
    assert "damaged" not in capsys.readouterr().out


def test_empty_captions_are_named_as_training_names_them(folder, tmp_path, capsys):
    (folder / "3_<b>cat").rename(folder / "3")
    assert main(words(folder, tmp_path)) == 2
    printed, faults = capsys.readouterr()
    assert value(printed, "empty captions") == "1: img5.png"
    assert "1 of 7" in faults


def test_headers_only_decodes_nothing(folder, tmp_path, capsys):
    assert main(words(folder, tmp_path, "--headers_only")) == 2
    assert "torn.png" not in "".join(capsys.readouterr())


def test_longer_captions_fit_where_the_limit_is_raised(folder, tmp_path, capsys):
    main(words(folder, tmp_path, "--max_token_length", 225, "--caption_prefix", "photo"))
    line = value(capsys.readouterr().out, "tokens (CLIP)")
    assert line == f"1 of 7 captions are cut; the longest caption has {TOKENS + 1} of 225"


def test_tokens_are_those_of_the_model_given(folder, tmp_path, capsys, toy_shelf):
    """A model's own folders: CLIP with a toy's words, and T5, which takes fewer tokens here."""
    from transformers import AutoTokenizer

    tokenizers = toy_shelf.paths("flux")
    folders = [path for name, path in sorted(tokenizers.items()) if name.startswith("tokenizer")]
    main(words(folder, tmp_path, "--tokenizer", *folders, "--t5xxl_max_token_length", 100))
    printed = capsys.readouterr().out
    found = [value(printed, f"tokens ({path.name})") for path in folders]
    for path, text in zip(folders, found, strict=True):
        expected = len(AutoTokenizer.from_pretrained(path)(LONG, add_special_tokens=False).input_ids)
        assert f"the longest caption has {expected} of " in text
    assert any(text.endswith("of 99") for text in found)
    assert any(text.endswith("of 75") for text in found)


def grey(image: Image.Image) -> np.ndarray:
    return np.asarray(image, np.float64).mean(2).ravel()


class Page(HTMLParser):
    """Images, texts and addresses of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.images: list[Image.Image] = []
        self.addresses: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        for name in ("src", "href"):
            if name in given:
                self.addresses.append(given[name])
        if tag == "img":
            image = Image.open(BytesIO(base64.b64decode(given["src"].partition(",")[2])))
            assert (str(image.width), str(image.height)) == (given["width"], given["height"])
            self.images.append(image)
        if tag not in ("img", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data + "\n"


def test_the_page_is_valid_and_shows_what_the_model_sees(folder, tmp_path):
    before = tree(folder)
    main(words(folder, tmp_path, "--html", tmp_path / "new" / "page.html"))
    html = (tmp_path / "new" / "page.html").read_text(encoding="utf-8")
    found = Page(html)
    assert found.open == []
    assert all(address.startswith("data:image/jpeg;base64,") for address in found.addresses)
    assert "http" not in html
    assert "url(" not in html
    assert len(found.images) == 6
    assert {image.size for image in found.images} == {(64, 64), (96, 32)}
    right, other = (grey(Image.open(folder / "3_<b>cat" / f"img{i}.png")) for i in (0, 2))
    assert np.corrcoef(right, grey(found.images[0]))[0, 1] > 0.8
    assert abs(np.corrcoef(other, grey(found.images[0]))[0, 1]) < 0.2
    for text in ("<i>striped</i> & small", "3_<b>cat", "text.png", "torn.png", "Training would stop here"):
        assert text in found.text
    assert tree(folder) == before


def test_masks_are_paired_and_seen(folder, tmp_path, capsys):
    """What a mask hides is darkened on the page: here the left half of each image."""
    masks = tmp_path / "masks"
    masks.mkdir()
    for path in sorted((folder / "3_<b>cat").glob("img*.png")):
        size = Image.open(path).size
        mask = np.full((size[1], size[0]), 255, np.uint8)
        mask[:, : size[0] // 2] = 0
        Image.fromarray(mask).save(masks / path.name)
    for name in ("text.png", "torn.png", "torn.txt"):
        (folder / "3_<b>cat" / name).unlink()
    file = tmp_path / "d.toml"
    file.write_text(f"""[[datasets]]
        resolution = 64
        [[datasets.subsets]]
        image_dir = '{folder / "3_<b>cat"}'
        class_tokens = 'cat'
        conditioning_data_dir = '{masks}'""")
    argv = ["dataset", "inspect", str(file), "--cache_dir", str(tmp_path / "cache"), "--masked_loss"]
    argv += ["--caption_extension", ".txt", "--html", str(tmp_path / "page.html")]
    argv += ["--enable_bucket", "--min_bucket_reso", "32", "--bucket_reso_steps", "32"]
    assert main(argv) == 0
    assert value(capsys.readouterr().out, "masks") == f"6 of 6 images have a mask in {masks}"
    found = Page((tmp_path / "page.html").read_text())
    for image in found.images:
        pixels = np.asarray(image, np.float64)
        left, right = np.split(pixels[:, :, :], 2, axis=1)
        assert abs(left.mean() / right.mean() - 0.25) < 0.05


def test_the_page_shows_as_many_images_as_asked_for(folder, tmp_path):
    main(words(folder, tmp_path, "--html", tmp_path / "page.html", "--pictures", 2))
    found = Page((tmp_path / "page.html").read_text())
    assert len(found.images) == 2
    assert "img0.png" in found.text
    assert "img3.png" in found.text


def test_a_dataset_file_and_its_subsets(folder, tmp_path, capsys):
    text = "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '{}'\nis_reg = {}\nnum_repeats = 2\n"
    other = tmp_path / "other"
    other.mkdir()
    make_image((70, 70), 3).save(other / "a.png")
    (other / "a.txt").write_text("a dog")
    file = tmp_path / "d.toml"
    subset = "[[datasets.subsets]]" + text.split("[[datasets.subsets]]")[1]
    file.write_text(text.format(folder / "3_<b>cat", "false") + subset.format(other, "true"))
    argv = [str(each) for each in ("dataset", "inspect", file, "--cache_dir", tmp_path / "cache")]
    assert main([*argv, "--caption_extension", ".txt", "--html", str(tmp_path / "page.html")]) == 2
    printed = capsys.readouterr().out
    assert value(printed, "images") == "7, each 2 times, 14 samples per epoch"
    assert value(printed, "regularization images").startswith("1, each 2 times")
    assert "other, regularization" in Page((tmp_path / "page.html").read_text()).text


def test_a_size_is_assumed_for_a_first_look(folder, tmp_path, capsys):
    main(["dataset", "inspect", str(folder), "--cache_dir", str(tmp_path / "cache"), "--headers_only"])
    printed = capsys.readouterr().out
    assert "no --resolution given" in printed
    assert "1024x1024" in printed


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--html"], "--html needs a value"),
        (["--pictures", "many"], "'many'"),
        (["/nowhere"], "/nowhere does not exist"),
        ([], "no images to train on"),
        (["--headers_onyl"], "did you mean --headers_only?"),
    ],
)
def test_faults(argv, words, capsys):
    assert main(["dataset", "inspect", *argv]) == 2
    assert words in capsys.readouterr().err


@pytest.fixture
def sound(folder) -> Path:
    for name in ("text.png", "torn.png", "torn.txt"):
        (folder / "3_<b>cat" / name).unlink()
    return folder


def test_debug_dataset_shows_the_first_samples_and_trains_nothing(sound, tmp_path, capsys, toy_shelf):
    """The captions and images are those that the loader gives to training."""
    from sfumato.config import load_config

    model = toy_shelf.paths("sd")["pretrained_model_name_or_path"]
    argv = ["--pretrained_model_name_or_path", model, "--train_data_dir", sound, "--output_dir", tmp_path / "out"]
    argv += ["--resolution", 64, "--caption_extension", ".txt", "--shuffle_caption", "--flip_aug", "--seed", 4]
    argv += ["--train_batch_size", 2, "--cache_dir", tmp_path / "cache", "--console_log_level", "ERROR"]
    before = tree(sound)
    assert main(["train", *map(str, argv), "--debug_dataset"]) == 0
    printed = capsys.readouterr().out
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["last.dataset.html"]
    assert tree(sound) == before
    samples = re.findall(r"^(\S+), step (\d+): weight 1, .*: '(.*)'$", printed, re.MULTILINE)
    assert [int(step) for _, step, _ in samples] == [i // 2 + 1 for i in range(16)]
    config = load_config([str(each) for each in argv])
    assert [(name, caption) for name, _, caption in samples] == list_first_captions(config)
    assert len(Page((tmp_path / "out" / "last.dataset.html").read_text()).images) == 6 + 16


def list_first_captions(config) -> list[tuple[str, str]]:
    """File and caption of the first samples by the rules of sd-scripts: functions of the seed alone."""
    from itertools import islice

    from sfumato.common.seeds import python_random
    from sfumato.data.batch_sampler import BatchSampler
    from sfumato.data.captions import process_caption
    from sfumato.data.find.discover import find_data
    from sfumato.errors import Problems

    plan = find_data(config, bucket_step=8, problems=Problems())
    captions = []
    for step in islice(BatchSampler(plan, seed=4).steps(), 8):
        for sample in step.batches[0].samples:
            rules, generator = sample.subset.settings.rules, python_random(4, "caption", sample.id)
            text = process_caption(
                sample.item.image.caption, rules, generator, epoch=step.epoch + 1, step=step.index, max_train_steps=1
            )
            captions.append((Path(sample.item.image.path).name, text))
    return captions


def test_debug_dataset_names_the_faults(folder, tmp_path, capsys, toy_shelf):
    model = toy_shelf.paths("sd")["pretrained_model_name_or_path"]
    argv = ["--pretrained_model_name_or_path", model, "--train_data_dir", folder, "--output_dir", tmp_path / "out"]
    argv += ["--resolution", 64, "--debug_dataset", "--caption_extension", ".txt", "--cache_dir", tmp_path / "cache"]
    assert main(["train", *map(str, argv)]) == 2
    assert "torn.png" in capsys.readouterr().err
    assert (tmp_path / "out" / "last.dataset.html").is_file()


def test_what_was_whole_is_not_read_again(tmp_path, capsys, monkeypatch):
    """Nor what training has read; an image that changed is."""
    decoded: list[str] = []
    real = verify_images.decode_layers

    def decode(data: bytes, path: str, **options: bool):
        decoded.append(Path(path).name)
        return real(data, path, **options)

    monkeypatch.setattr(verify_images, "decode_layers", decode)
    folder = tmp_path / "a"
    folder.mkdir()
    for i in range(4):
        image = make_image((64, 64), i).convert("RGBA")
        image.putpixel((3, 4), (200, 100, 50, 9 if i < 2 else 255))
        image.save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text("a cat")
    for _ in range(2):
        assert main(words(folder, tmp_path)) == 0
        assert value(capsys.readouterr().out, "with transparent parts") == "2: 0.png, 1.png"
    assert sorted(decoded) == ["0.png", "1.png", "2.png", "3.png"]
    make_image((64, 64), 9).save(folder / "2.png")
    assert main(words(folder, tmp_path)) == 0
    assert decoded[4:] == ["2.png"]


def test_control_images_are_named_and_shown(folder, tmp_path, capsys, codes):
    """Beside the images that they steer."""
    control = tmp_path / "control"
    control.mkdir()
    for i in range(6):
        make_image((96, 32) if i % 2 else (64, 64), 20 + i).save(control / f"img{i}.png")
    for name in ("text.png", "torn.png", "img5.png"):
        next(folder.rglob(name)).unlink()
    (control / "img5.png").unlink()
    page = tmp_path / "page.html"
    more = ("--method", "control_net", "--conditioning_data_dir", control, "--html", page)
    assert main(words(folder, tmp_path, *more)) == 0
    assert value(capsys.readouterr().out, "control images").startswith("5 of 5 images")
    first = re.search(r'data:image/jpeg;base64,([^"]+)', page.read_text())
    assert first
    assert Image.open(BytesIO(base64.b64decode(first[1]))).size == (128, 64)
