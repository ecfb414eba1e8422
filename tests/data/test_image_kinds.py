"""Images as people bring them: endings, formats, transparency and gray levels, found and decoded, or named."""

from __future__ import annotations

import ast
import os
import socket
import struct
import sys
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, features

from data.conftest import make_image
from data.dataset_files import list_captions, write_archive, write_metadata
from house_rules import everywhere, last_name, parsed_file
from sfumato.data.find import image_formats
from sfumato.data.find.alpha_notes import EXAMINED_IMAGES
from sfumato.data.find.headers import parse_image_header
from sfumato.data.images import decode_image
from sfumato.errors import UserError

ARGV = ("--resolution", 64, "--caption_extension", ".txt")
KINDS = {
    "a.PNG": "PNG", "b.tif": "TIFF", "c.TIFF": "TIFF", "d.gif": "GIF", "e.jfif": "JPEG", "f.jpe": "JPEG",
    "g.Jpg": "JPEG", "h.webp": "WEBP", "i.bmp": "BMP", "j.ppm": "PPM", "k.pgm": "PPM", "l.qoi": "QOI",
}  # fmt: skip
if features.check("jpg_2000"):
    KINDS |= {"m.jp2": "JPEG2000", "n.j2k": "JPEG2000"}
if features.check("avif"):
    KINDS |= {"o.avif": "AVIF"}
UNREAD = {"x.psd": b"8BPS", "y.CR2": b"II*\0", "z.cr2": b"II*\0"}


def encode(kind: str, image: Image.Image | None = None, **options) -> bytes:
    buffer = BytesIO()
    (image or make_image((64, 64))).save(buffer, kind, **options)
    return buffer.getvalue()


def make_files() -> dict[str, bytes | str]:
    files: dict[str, bytes | str] = {name: encode(kind) for name, kind in KINDS.items()}
    files |= {f"{name.partition('.')[0]}.txt": f"caption of {name}" for name in KINDS}
    return files | UNREAD


def write_folder(folder: Path, files: dict[str, bytes | str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


@pytest.mark.parametrize("source", ["folder", "archive", "metadata", "regularization", "subfolders"])
def test_every_source_takes_every_ending_and_counts_the_others(find, tmp_path, source):
    files, wanted = make_files(), {name: f"caption of {name}" for name in KINDS}
    if source == "archive":
        write_archive(tmp_path / "set.tar", files)
        plan = find.toml("[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '{root}/set.tar'\n")
    elif source == "metadata":
        write_folder(tmp_path / "set", files)
        meta = write_metadata(tmp_path / "m.json", {name: {"caption": f"caption of {name}"} for name in KINDS})
        plan = find("--in_json", meta, "--train_data_dir", tmp_path / "set", "--resolution", 64)
    else:
        folder = {"regularization": "reg/1_a", "subfolders": "t/1_a/deep"}.get(source, "t/1_a")
        write_folder(tmp_path / folder, files)
        more = ()
        if source == "regularization":
            write_folder(tmp_path / "t" / "20_a", {"only.png": encode("PNG"), "only.txt": "x"})
            wanted["only.png"], more = "x", ("--reg_data_dir", tmp_path / "reg")
        plan = find("--train_data_dir", tmp_path / "t", *more, *ARGV)
    assert list_captions(plan) == wanted
    if source != "metadata":
        assert any("3 files are no images that sfumato reads: .cr2 (2), .psd (1)" in note for note in plan.notes)


def test_masks_of_other_endings_are_paired(find, tmp_path):
    write_folder(tmp_path / "t", {"a.png": encode("PNG"), "B.png": encode("PNG"), "a.txt": "x", "b.TXT": "y"})
    write_folder(tmp_path / "masks", {"a.TIF": encode("TIFF"), "b.gif": encode("GIF"), "c.psd": b"8BPS"})
    text = "[[datasets]]\nresolution = 64\ncaption_extension = '.txt'\n[[datasets.subsets]]\nimage_dir = '{root}/t'\n"
    plan = find.toml(text + "conditioning_data_dir = '{root}/masks'\n", "--masked_loss")
    pairs = {Path(item.image.path).name: Path(item.conditioning.path).name for _, _, item in plan.iterate_used()}
    assert pairs == {"a.png": "a.TIF", "B.png": "b.gif"}
    assert any("1 file is no image" in note and ".psd (1)" in note for note in plan.notes)


@pytest.mark.parametrize("source", ["folder", "archive"])
def test_captions_in_other_cases_are_found_and_own_ones_come_first(find, tmp_path, source):
    names = ("A.PNG", "b.png", "Cat.png", "cat.png", "D_1_2_3_4.png")
    files: dict[str, bytes | str] = {name: encode("PNG") for name in names}
    files |= {"A.TXT": "upper", "B.txt": "stem", "Cat.txt": "large cat", "cat.TXT": "small cat", "d.Txt": "face"}
    if source == "archive":
        del files["D_1_2_3_4.png"]
        write_archive(tmp_path / "s.tar", files)
    else:
        write_folder(tmp_path / "s", files)
    where = tmp_path / ("s.tar" if source == "archive" else "s")
    text = f"[[datasets]]\nresolution = 64\ncaption_extension = '.txt'\n[[datasets.subsets]]\nimage_dir = '{where}'\n"
    wanted = {
        "A.PNG": "upper",
        "b.png": "stem",
        "Cat.png": "large cat",
        "cat.png": "small cat",
        "D_1_2_3_4.png": "face",
    }
    assert list_captions(find.toml(text)) == {name: text for name, text in wanted.items() if name in files}


@pytest.mark.parametrize("source", ["folder", "archive"])
def test_an_extension_that_was_given_is_the_only_one(find, tmp_path, source):
    files = {"a.png": encode("PNG"), "a.txt": "from the file"}
    if source == "archive":
        write_archive(tmp_path / "1_cat.tar", files)
    else:
        write_folder(tmp_path / "t" / "1_cat", files)
    where = tmp_path / ("1_cat.tar" if source == "archive" else "t/1_cat")
    for extension in ("'.none-use-foldername'", "'.caption'"):
        text = f"[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '{where}'\nclass_tokens = 'cat'\n"
        assert list_captions(find.toml(text + f"caption_extension = {extension}")) == {"a.png": "cat"}
        assert list_captions(find.toml(text)) == {"a.png": "from the file"}


def test_the_error_about_captions_names_the_files_that_are_there(find, tmp_path):
    write_folder(tmp_path / "t" / "1_", {"a.png": encode("PNG"), "a.txt": "x"})
    find.attempt("--train_data_dir", tmp_path / "t", "--resolution", 64, "--caption_extension", ".caption")
    assert find.codes == ["captions-missing"]
    assert "1 .txt files" in find.messages[0]


def test_without_a_plugin_its_images_are_counted_in_one_error(find, tmp_path, monkeypatch):
    heic = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(2000)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.setitem(sys.modules, "pillow_jxl", None)
    files = {f"{i}.heic": heic for i in range(3)} | {"a.jxl": b"\xff\x0a" + bytes(99), "b.png": encode("PNG")}
    write_folder(tmp_path / "t" / "1_cat", files)
    find.attempt("--train_data_dir", tmp_path / "t", "--resolution", 64)
    assert sorted(find.codes) == ["heif-plugin-missing", "jxl-plugin-missing"]
    text = next(message for message in find.messages if "HEIC" in message)
    assert "3 images" in text
    assert "pillow-heif" in text
    plan = find("--train_data_dir", tmp_path / "t", "--resolution", 64, "--on_bad_image", "skip")
    assert list_captions(plan) == {"b.png": "cat"}
    assert any("4 bad images are skipped" in note and "pillow-heif" in note for note in plan.notes)


def test_a_plugin_that_comes_and_goes(find, tmp_path, monkeypatch):
    pytest.importorskip("pillow_heif")
    image_formats.import_heif_plugin("x")
    write_folder(tmp_path / "t" / "1_cat", {"a.heic": encode("HEIF")})
    assert len(list_captions(find("--train_data_dir", tmp_path / "t", "--resolution", 64))) == 1
    monkeypatch.setattr(image_formats, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    find.attempt("--train_data_dir", tmp_path / "t", "--resolution", 64)
    assert find.codes == ["heif-plugin-missing"]


def test_heic_is_read_by_its_plugin():
    pytest.importorskip("pillow_heif")
    image_formats.import_heif_plugin("x")
    image = make_image((64, 48)).resize((256, 192), Image.Resampling.BICUBIC)
    data = encode("HEIF", image, quality=95)
    assert parse_image_header(data, "x")[:2] == (256, 192)
    assert np.abs(np.asarray(decode_image(data, "x")).astype(int) - np.asarray(image)).mean() < 6


@pytest.mark.parametrize("start", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n", b"%PDF-1.4\n", b"8BPS\0\1"])
def test_no_other_format_is_opened_whatever_its_name(start, tmp_path, monkeypatch):
    ghostscript = write_folder(tmp_path / "bin", {"gs": f"#!/bin/sh\necho 10.0 >> {tmp_path}/ran\n"}) / "gs"
    ghostscript.chmod(0o755)
    monkeypatch.setenv("PATH", f"{ghostscript.parent}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(UserError) as error:
        decode_image(start + b"showpage\n" * 50, "innocent.png")
    assert error.value.code == "image-header-damaged"
    assert not (tmp_path / "ran").exists()


def test_every_image_is_opened_with_named_formats():
    def rule(path: Path):
        for node in ast.walk(parsed_file(path)):
            if isinstance(node, ast.Call) and last_name(node.func) == "open" and ast.unparse(node.func) == "Image.open":
                if "formats" not in {keyword.arg for keyword in node.keywords}:
                    yield f"{node.lineno}: {ast.unparse(node)}"

    assert not everywhere(rule)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_what_is_no_plain_file_is_named(find, tmp_path):
    folder = write_folder(tmp_path / "t" / "1_cat", {"a.png": encode("PNG")})
    os.mkfifo(folder / "pipe.png")
    (folder / "folder.png").mkdir()
    (folder / "gone.png").symlink_to(folder / "nowhere.png")
    with socket.socket(socket.AF_UNIX) as server:
        here = Path.cwd()
        os.chdir(folder)  # the path of a socket must be short
        server.bind("socket.png")
        os.chdir(here)
        find.attempt("--train_data_dir", tmp_path / "t", "--resolution", 64)
    assert sorted(find.codes) == ["data-file-unreadable", "file-is-special", "file-is-special"]
    plan = find("--train_data_dir", tmp_path / "t", "--resolution", 64, "--on_bad_image", "skip")
    assert list_captions(plan) == {"a.png": "cat"}
    assert any("folder.png" in note and "is a folder" in note for note in plan.notes)
    row = next(item.image for _, _, item in plan.iterate_used())
    (folder / "a.png").unlink()
    os.mkfifo(folder / "a.png")
    with pytest.raises(UserError) as error:
        row.read()
    assert error.value.code == "file-is-special"


def make_rgba(lowest: int) -> Image.Image:
    image = make_image((64, 64)).convert("RGBA")
    alpha = np.full((64, 64), 255, np.uint8)
    alpha[:8] = lowest
    image.putalpha(Image.fromarray(alpha))
    return image


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF", "GIF"])
def test_transparent_images_are_counted_and_opaque_ones_are_not(find, tmp_path, kind):
    folder = tmp_path / "t" / "1_cat"
    folder.mkdir(parents=True)
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    for name, lowest in (("clear", 0), ("half", 100 if kind != "GIF" else 0), ("opaque", 255)):
        make_rgba(lowest).save(folder / f"{name}.{kind.lower()}", kind, **options)
    make_image((64, 64)).save(folder / "photo.jpg")
    notes = find("--train_data_dir", tmp_path / "t", "--resolution", 64).notes
    (note,) = [note for note in notes if "transparent parts" in note]
    assert "2 of 4 images" in note
    assert f"clear.{kind.lower()}, half.{kind.lower()}" in note
    (note,) = [
        note
        for note in find("--train_data_dir", tmp_path / "t", "--resolution", 64, "--alpha_mask").notes
        if "alpha" in note
    ]
    assert "2 of 4 images are opaque" in note


def test_alpha_mask_over_opaque_images_is_an_option_without_effect(find, tmp_path):
    write_folder(tmp_path / "t" / "1_cat", {"a.png": encode("PNG", make_rgba(255)), "b.jpg": encode("JPEG")})
    argv = ("--train_data_dir", tmp_path / "t", "--resolution", 64, "--alpha_mask")
    assert any("alpha_mask has no effect: all 2 images are opaque" in note for note in find(*argv).notes)
    find.attempt(*argv, "--strict")
    assert find.codes == ["data-option-without-effect"]


def test_only_some_of_many_images_with_alpha_are_decoded(find, tmp_path):
    data = encode("PNG", make_rgba(9))
    write_folder(tmp_path / "t" / "1_cat", {f"{i:03}.png": data for i in range(EXAMINED_IMAGES + 7)})
    notes = find("--train_data_dir", tmp_path / "t", "--resolution", 64).notes
    counts = (
        f"{EXAMINED_IMAGES} of the first {EXAMINED_IMAGES} of the {EXAMINED_IMAGES + 7} images with an alpha channel"
    )
    assert any(counts in note for note in notes)


def test_frames_and_pages_are_counted(find, tmp_path):
    folder = tmp_path / "t" / "1_cat"
    folder.mkdir(parents=True)
    frames = [make_image((64, 64), seed) for seed in range(3)]
    for kind in ("GIF", "PNG", "WEBP", "TIFF"):
        frames[0].save(folder / f"moves.{kind.lower()}", kind, save_all=True, append_images=frames[1:])
        frames[0].save(folder / f"still.{kind.lower()}", kind)
    (note,) = [n for n in find("--train_data_dir", tmp_path / "t", "--resolution", 64).notes if "several frames" in n]
    assert "4 of 8 images" in note
    assert "moves.gif, moves.png, moves.tiff, moves.webp" in note


GRADIENT = np.linspace(0, 1, 64 * 64).reshape(64, 64)


LEVELS = {
    "16 bits": (GRADIENT * 65535).astype(np.uint16),
    "32 bits": (GRADIENT * 65535).astype(np.int32),
    "floats": GRADIENT.astype(np.float32),
    "8 bits in floats": np.rint(GRADIENT * 255).astype(np.float32),
}


@pytest.mark.parametrize("depth", LEVELS)
def test_gray_of_any_depth_is_scaled_to_its_white(depth):
    pixels = np.asarray(decode_image(encode("TIFF", Image.fromarray(LEVELS[depth])), "x")).astype(float)
    assert np.abs(pixels - GRADIENT[..., None] * 255).max() <= 1


@pytest.mark.parametrize(("white", "zero_is_white"), [(12, False), (16, False), (16, True)])
def test_gray_tiff_of_other_conventions(white, zero_is_white):
    """A TIFF of one strip, written by hand (TIFF 6.0): of 12 bits, and with 0 for white, which Pillow does not heed."""
    levels = (GRADIENT * (2**white - 1)).astype(np.uint16)
    packed = levels.tobytes()
    if white == 12:
        pairs = levels.reshape(-1, 2).astype(int)
        packed = np.stack([pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], 1)
        packed = packed.astype(np.uint8).tobytes()
    tags = {256: 64, 257: 64, 258: white, 259: 1, 262: 0 if zero_is_white else 1, 273: 200, 277: 1, 278: 64}
    tags[279] = len(packed)
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    data = (b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries).ljust(200, b"\0") + packed
    pixels = np.asarray(decode_image(data, "x")).astype(float)
    wanted = GRADIENT * 255
    assert np.abs(pixels[..., 0] - (255 - wanted if zero_is_white else wanted)).max() < 1.5


@pytest.mark.parametrize(
    "values", [GRADIENT * 3, GRADIENT - 0.5, GRADIENT * np.nan, (GRADIENT * 99999).astype(np.int32)]
)
def test_gray_whose_white_is_not_known_is_named(values):
    image = Image.fromarray(values if values.dtype == np.int32 else values.astype(np.float32))
    with pytest.raises(UserError) as error:
        decode_image(encode("TIFF", image), "scan.tif")
    assert error.value.code == "gray-range-unknown"
    assert "scan.tif" in str(error.value)


def test_lab_and_cmyk_are_the_rgb_they_were_made_of():
    image = make_image((64, 64))
    spaces = (ImageCms.createProfile(name) for name in ("sRGB", "LAB"))
    lab = ImageCms.profileToProfile(image, *spaces, outputMode="LAB")
    for other, tolerance in ((lab, 3), (image.convert("CMYK"), 0)):
        pixels = np.asarray(decode_image(encode("TIFF", other), "x")).astype(int)
        assert np.abs(pixels - np.asarray(image)).mean() <= tolerance
