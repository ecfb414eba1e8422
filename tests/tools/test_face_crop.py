"""`sfumato dataset face-crop` with a small ONNX detector made here: where the face is in a crop, and in its name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from sfumato.cli.main import main
from sfumato.compat.launch import main as launch
from sfumato.data.augment import parse_face
from sfumato.tools.face_detector import DetectedBox, compute_overlap, open_detector, select_best

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

FACE, SMALL = (400.0, 300.0, 120.0, 100.0, 0.9), (100.0, 80.0, 40.0, 40.0, 0.8)  # center, size, score
DOUBLE, UNSURE = (404.0, 300.0, 120.0, 100.0, 0.7), (500.0, 100.0, 60.0, 60.0, 0.1)


def write_detector(path: Path, *boxes: tuple[float, ...], side: int | str = "S") -> Path:
    """A model that finds these boxes in every image, in its own pixels; its output hangs on the input by a factor 0."""
    helper, numpy_helper, kind = onnx.helper, onnx.numpy_helper, onnx.TensorProto.FLOAT
    constants = {
        "boxes": np.array(boxes, np.float32).T[None],
        "zero": np.zeros((1, 1, 1), np.float32),
        "axes": np.array([1, 2, 3], np.int64),
        "one": np.array([2], np.int64),
    }
    nodes = [
        helper.make_node("ReduceMean", ["images", "axes"], ["mean"], keepdims=0),
        helper.make_node("Reshape", ["mean", "shape"], ["column"]),
        helper.make_node("Mul", ["column", "zero"], ["nothing"]),
        helper.make_node("Add", ["boxes", "nothing"], ["output0"]),
    ]
    constants["shape"] = np.array([1, 1, 1], np.int64)
    del constants["one"]
    graph = helper.make_graph(
        nodes, "detector", [helper.make_tensor_value_info("images", kind, [1, 3, side, side])],
        [helper.make_tensor_value_info("output0", kind, [1, 5, len(boxes)])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A picture of 640 x 480 with a face, a red box, where the detector says one is, and a smaller green one."""
    folder = tmp_path / "images"
    folder.mkdir()
    image = Image.new("RGB", (640, 480), (90, 90, 90))
    ImageDraw.Draw(image).rectangle((340, 250, 459, 349), fill=(255, 0, 0))
    ImageDraw.Draw(image).rectangle((80, 60, 119, 99), fill=(0, 255, 0))
    image.save(folder / "pic.png")
    return folder


def crop(images: Path, target: Path, *words: object) -> dict[str, Image.Image]:
    model = write_detector(target.parent / "faces.onnx", FACE, SMALL, DOUBLE, UNSURE)
    line = ["dataset", "face-crop", "--src_dir", images, "--dst_dir", target, "--model_file", model, *words]
    assert main(list(map(str, line))) == 0
    return {path.name: Image.open(path) for path in sorted(target.iterdir())}


def find_red(image: Image.Image, color: int = 0) -> tuple[float, float, float, float]:
    """Center and size of what is red."""
    pixels = np.asarray(image.convert("RGB")).astype(int)
    rows, columns = np.nonzero(pixels[..., color] - pixels[..., (color + 1) % 3] > 100)
    left, right, top, bottom = columns.min(), columns.max() + 1, rows.min(), rows.max() + 1
    return (left + right) / 2, (top + bottom) / 2, right - left, bottom - top


@pytest.mark.parametrize(
    ("words", "size"),
    [
        ([], (640, 480)),
        (["--crop_size", "256,256"], (256, 256)),
        (["--crop_size", "512,448"], (512, 448)),  # the face is near the border, so not in the middle
        (["--crop_size", "320,320", "--resize_fit"], (320, 320)),
        (["--crop_size", "1000,600"], (1000, 600)),  # the image is enlarged
        (["--crop_size", "256,256", "--resize_face_size", "60"], (256, 256)),
        (["--crop_size", "256,256", "--resize_face_size", "200"], (256, 256)),
        (["--crop_size", "256,256", "--resize_face_size", "10"], (256, 256)),  # no smaller than the crop
        (["--crop_ratio", "2,1.5"], (240, 180)),
    ],
)
def test_the_name_says_where_the_face_is(images: Path, tmp_path: Path, words: list[str], size: tuple[int, int]) -> None:
    ((name, image),) = crop(images, tmp_path / "out", *words).items()
    assert image.size == size
    face = parse_face(name)  # as --face_crop_aug_range reads it
    assert face is not None
    assert find_red(image) == pytest.approx((face.x, face.y, face.width, face.height), abs=2)
    if size == (256, 256) and "--resize_face_size" in words:
        assert face.width == max(int(words[-1]), round(120 * 256 / 480))


def test_several_faces_are_numbered_by_size(images: Path, tmp_path: Path) -> None:
    found = crop(images, tmp_path / "out", "--multiple_faces", "--crop_ratio", "1,1")
    assert list(found) == ["pic_01_0060_0060_0120_0100.png", "pic_02_0020_0020_0040_0040.png"]
    assert find_red(found["pic_02_0020_0020_0040_0040.png"], 1)[2:] == (40, 40)
    sized = crop(images, tmp_path / "sized", "--multiple_faces", "--min_size", 40, "--max_size", 120)
    assert [name[:6] for name in sized] == ["pic_01"]
    assert parse_face(next(iter(sized))) == (100, 80, 40, 40)


@pytest.mark.parametrize("degrees", [-30, 20])
def test_a_tilted_face_is_turned_upright(tmp_path: Path, degrees: int) -> None:
    """The eyes, which the second detector finds, are at one height afterwards."""
    image = Image.new("RGB", (400, 400), (90, 90, 90))
    draw, turn = ImageDraw.Draw(image), np.deg2rad(degrees)
    eyes = []
    for side in (-1, 1):
        x, y = 200 + side * 50 * np.cos(turn), 200 + side * 50 * np.sin(turn)
        draw.ellipse((x - 8, y - 8, x + 8, y + 8), fill=(255, 0, 0))
        eyes.append((x - 80, y - 80, 16.0, 16.0, 0.9))  # in the crop around the face, whose margin is 20
    (tmp_path / "images").mkdir()
    image.save(tmp_path / "images" / "a.png")
    faces = write_detector(tmp_path / "f.onnx", (200.0, 200.0, 200.0, 200.0, 0.9))
    other = write_detector(tmp_path / "e.onnx", *eyes)
    words = ["tools/detect_face_rotate", "--src_dir", tmp_path / "images", "--dst_dir", tmp_path / "out", "--rotate"]
    words += ["--model_file", faces, "--eye_model_file", other]
    assert launch(list(map(str, words))) == 0
    (path,) = (tmp_path / "out").iterdir()
    x, y, width, height = find_red(Image.open(path))
    assert (x, y) == pytest.approx((200, 200), abs=1.5)
    assert width == pytest.approx(117, abs=3)
    assert height == pytest.approx(17, abs=3)


@pytest.mark.parametrize(("size", "side"), [((1280, 320), "S"), ((300, 200), "S"), ((1000, 500), 320)])
def test_boxes_are_in_pixels_of_the_image(tmp_path: Path, size: tuple[int, int], side: int | str) -> None:
    scale = min(side / size[0], side / size[1]) if isinstance(side, int) else min(1, 640 / max(size))
    path = write_detector(tmp_path / "m.onnx", (40.0, 30.0, 20.0, 10.0, 0.5), (-5.0, 30.0, 20.0, 10.0, 0.4), side=side)
    detector = open_detector(path, ("", ""), tmp_path, option="--model_file")
    first, second = detector.detect(Image.new("RGB", size), 0.3)
    assert first == pytest.approx((30 / scale, 25 / scale, 50 / scale, 35 / scale, 0.5))
    assert second == pytest.approx((0, 25 / scale, 5 / scale, 35 / scale, 0.4))


def test_overlap_and_the_best_boxes() -> None:
    first, half = DetectedBox(0, 0, 10, 10, 0.9), DetectedBox(5, 0, 15, 10, 0.8)
    assert compute_overlap(first, half) == pytest.approx(50 / 150)
    assert compute_overlap(first, DetectedBox(20, 20, 30, 30, 0.5)) == 0
    near = DetectedBox(0, 0, 10, 9, 0.95)  # shares 90 of 100
    assert select_best([first, half, near]) == [near, half]


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--resize_face_size", "60", "--resize_fit"], "face-sizes-conflict"),
        (["--resize_face_size", "60", "--crop_ratio", "2,2"], "face-sizes-conflict"),
        (["--crop_size", "512"], "face-crop-pair-invalid"),
        (["--crop_ratio", "0,1"], "face-crop-pair-invalid"),
        (["--model_file", "images/pic.png"], "onnx-model-invalid"),
        (["--dst_dir", "images"], "faces-into-source"),
    ],
)
def test_faults(
    images: Path, tmp_path: Path, codes: list[str], monkeypatch: pytest.MonkeyPatch, words: list[str], code: str
) -> None:
    monkeypatch.chdir(tmp_path)
    model = write_detector(tmp_path / "faces.onnx", FACE)
    given = {"--src_dir": "images", "--dst_dir": "out", "--model_file": str(model)}
    given |= {words[i]: words[i + 1] for i in range(0, len(words) - 1, 2)}
    line = [word for pair in given.items() for word in pair] + words[len(words) // 2 * 2 :]
    assert main(["dataset", "face-crop", *line]) == 2
    assert codes == [code]
    assert [path.name for path in images.iterdir()] == ["pic.png"]


def test_without_the_package(images: Path, tmp_path: Path, codes: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_detector(tmp_path / "faces.onnx", FACE)
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    words = ["--src_dir", images, "--dst_dir", tmp_path / "out", "--model_file", model]
    assert main(["dataset", "face-crop", *map(str, words)]) == 2
    assert codes == ["onnx-package-missing"]
