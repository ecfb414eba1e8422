"""The whole tagger with small ONNX models in the layouts of WD14 v2, v3 and the newer kind, made here."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sfumato.cli.main import main
from sfumato.tools.image_batches import ImageReader
from sfumato.tools.tag_model import Tagger, find_model_files, load_tagger, prepare_image

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

SIDE = 8
WHITE = (255, 255, 255)
TAGS = ("general", "sensitive", "red_tag", "green_tag", "blue_tag", "hero_(film)")
CSV = "tag_id,name,category,count\n" + "".join(
    f"{i},{name},{category},1\n" for i, (name, category) in enumerate(zip(TAGS, "990004", strict=True))
)
CATEGORIES = ("Rating", "Rating", "General", "General", "General", "Character")
MAPPING = json.dumps({str(i): {"tag": t, "category": c} for i, (t, c) in enumerate(zip(TAGS, CATEGORIES, strict=True))})
#                  blue  green red: a tag for each color that is bright, ratings and a character by red alone
WEIGHTS = np.array([[0, 0, 0, 0, 1, 0], [0, 0, 0, 1, 0, 0], [-1, 1, 1, 0, 0, 1]], np.float32)


def write_model(path: Path, *, batch: int | str = "N", is_mapping: bool = False) -> Path:
    """Means of the channels times WEIGHTS, past a sigmoid unless the caller is to do that."""
    path.parent.mkdir(parents=True, exist_ok=True)
    helper, numpy_helper, kind = onnx.helper, onnx.numpy_helper, onnx.TensorProto.FLOAT
    scale = np.float32(8.0 if is_mapping else 16.0 / 255)
    shift = np.float32(0.0 if is_mapping else -8.0)
    constants = {
        "scaled": (WEIGHTS * scale).astype(np.float32),
        "shift": np.sum(WEIGHTS, axis=0) * shift,
        "axes": np.array([2, 3] if is_mapping else [1, 2], np.int64),
    }
    nodes = [
        helper.make_node("ReduceMean", ["images", "axes"], ["means"], keepdims=0),
        helper.make_node("MatMul", ["means", "scaled"], ["product"]),
        helper.make_node("Add", ["product", "shift"], ["logits"]),
        helper.make_node("Identity" if is_mapping else "Sigmoid", ["logits"], ["output"]),
    ]
    shape = [batch, 3, SIDE, SIDE] if is_mapping else [batch, SIDE, SIDE, 3]
    graph = helper.make_graph(
        nodes, "tagger", [helper.make_tensor_value_info("images", kind, shape)],
        [helper.make_tensor_value_info("output", kind, [batch, len(TAGS)])],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(model, path)
    table = "tag_mapping.json" if is_mapping else "selected_tags.csv"
    path.with_name(table).write_text(MAPPING if is_mapping else CSV)
    return path


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    for name, color in {"red.png": (255, 0, 0), "inner/green.png": (0, 255, 0), "blue.png": (0, 0, 255)}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), color).save(folder / name)
    return folder


def tag(*words: str | Path) -> int:
    return main(["dataset", "tag", *map(str, words)])


@pytest.mark.parametrize("is_mapping", [False, True])
@pytest.mark.parametrize("batch", ["N", 1, 2])
def test_the_command(images: Path, tmp_path: Path, is_mapping: bool, batch: int | str) -> None:
    model = write_model(tmp_path / "model" / "m.onnx", batch=batch, is_mapping=is_mapping)
    assert tag(images, "--model_file", model, "--recursive", "--use_rating_tags", "--batch_size", "3") == 0
    red = "sensitive, red_tag, hero_(film)"
    found = {path.name: path.read_text() for path in images.rglob("*.txt")}
    assert found == {"red.txt": f"{red}\n", "green.txt": "general, green_tag\n", "blue.txt": "general, blue_tag\n"}


def test_machines_tag_a_part_each(tmp_path: Path) -> None:
    """Each image in exactly one part; whose it is stays so when others are added, also in another folder."""
    model = write_model(tmp_path / "model" / "m.onnx")
    parts: list[dict[str, set[str]]] = []
    for folder, count in ((tmp_path / "few", 9), (tmp_path / "many", 12)):
        folder.mkdir()
        for i in range(count):
            Image.new("RGB", (20, 20)).save(folder / f"{i}.png")
        done: set[str] = set()
        parts.append({})
        for shard in ("1/3", "2/3", "3/3"):
            assert tag(folder, "--model_file", model, "--shard", shard) == 0
            own = {path.stem for path in folder.glob("*.txt")} - done
            parts[-1][shard] = own
            done |= own
        assert len(done) == count == sum(map(len, parts[-1].values()))
    assert all(len(parts[0][shard]) > 0 and parts[0][shard] <= parts[1][shard] for shard in parts[0])


@pytest.mark.parametrize("is_mapping", [False, True])
def test_probabilities_are_those_of_the_formula(tmp_path: Path, is_mapping: bool) -> None:
    path = write_model(tmp_path / "m.onnx", is_mapping=is_mapping)
    tagger = load_tagger(path, path.with_name("tag_mapping.json" if is_mapping else "selected_tags.csv"))
    pixels = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 3), np.uint8)
    means = pixels.reshape(-1, 3).mean(0)[::-1] / 127.5 - 1  # blue, green, red in [-1, 1]
    expected = 1 / (1 + np.exp(-8 * means @ WEIGHTS))
    assert np.allclose(tagger.predict([tagger.arrange(pixels)] * 2), [expected] * 2, atol=1e-5)


def test_images_are_padded_with_white_and_lie_on_white(tmp_path: Path) -> None:
    wide = np.zeros((16, 64, 4), np.uint8)
    wide[:, 32:] = (0, 0, 255, 255)  # the left half is transparent black
    Image.fromarray(wide, "RGBA").save(tmp_path / "a.png")
    pixels = prepare_image((tmp_path / "a.png").read_bytes(), "a.png", 64)
    assert (pixels[:24] == 255).all()
    assert (pixels[40:] == 255).all()
    assert (pixels[24:40, :32] == 255).all()
    assert (pixels[24:40, 32:] == (0, 0, 255)).all()


@pytest.mark.parametrize("name", ["tags.json", "tags.jsonl"])
def test_one_file_for_all(images: Path, tmp_path: Path, name: str) -> None:
    model = write_model(tmp_path / "m.onnx")
    output = tmp_path / name
    kind = "caption" if name.endswith("l") else "tags"  # as sd-scripts calls them
    other = {"x.png": {kind: "kept", "mine": 1}}
    lines = json.dumps({"image_path": "x.png", **other["x.png"]}) + "\n"
    output.write_text(lines if name.endswith("l") else json.dumps(other))
    assert tag(images, "--model_file", model, "--output_path", output) == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()] if name.endswith("l") else None
    entries = {row.pop("image_path"): row for row in rows} if rows else json.loads(output.read_text())
    assert entries == {
        **other,
        str(images / "red.png"): {kind: "red_tag, hero_(film)", "image_size": [20, 20]},
        str(images / "blue.png"): {kind: "blue_tag", "image_size": [20, 20]},
    }
    assert not list(images.rglob("*.txt"))


def test_tags_that_are_there(images: Path, tmp_path: Path) -> None:
    model = write_model(tmp_path / "m.onnx")
    (images / "red.txt").write_text("mine, red_tag\n")
    assert tag(images, "--model_file", model, "--append_tags", "--caption_extension", "txt") == 0
    assert (images / "red.txt").read_text() == "mine, red_tag, hero_(film)\n"
    (images / "blue.txt").write_text("mine")
    assert tag(images, "--model_file", model, "--skip_existing") == 0
    assert (images / "blue.txt").read_text() == "mine"


def test_an_interrupted_run_keeps_what_it_has(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, output = write_model(tmp_path / "m.onnx"), tmp_path / "tags.json"
    predict, calls = Tagger.predict, list[int]()

    def interrupted(self: Tagger, pixels: list[np.ndarray]) -> np.ndarray:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return predict(self, pixels)

    monkeypatch.setattr(Tagger, "predict", interrupted)
    arguments = (images, "--model_file", model, "--recursive", "--output_path", output, "--skip_existing")
    assert tag(*arguments) == 130
    assert len(json.loads(output.read_text())) == 1
    monkeypatch.setattr(Tagger, "predict", predict)
    assert tag(*arguments) == 0
    assert len(json.loads(output.read_text())) == 3


def test_unreadable_images_are_named_and_the_others_tagged(
    images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (images / "cut.png").write_bytes((images / "red.png").read_bytes()[:60])
    assert tag(images, "--model_file", write_model(tmp_path / "m.onnx"), "--frequency_tags") == 0
    out, err = capfd.readouterr()
    assert "cut.png" in err
    assert "red_tag: 1" in out
    assert out.splitlines()[-1].startswith("2 of 3 images")
    assert sorted(path.name for path in images.glob("*.txt")) == ["blue.txt", "red.txt"]


def test_a_model_of_the_hub_has_a_folder_of_its_own(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[str, str, Path]] = []

    def download(repo_id: str, name: str, *, local_dir: Path, force_download: bool) -> None:
        asked.append((repo_id, name, local_dir))

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    home = tmp_path / "models"
    plain = find_model_files("a/b", home, force_download=False)
    inner = find_model_files("a/b/c", home, force_download=False)
    assert plain == (home / "a_b" / "model.onnx", home / "a_b" / "selected_tags.csv")
    assert inner == (home / "a_b_c" / "c" / "model_optimized.onnx", home / "a_b_c" / "c" / "tag_mapping.json")
    assert [(repo, name) for repo, name, _ in asked] == [
        ("a/b", "model.onnx"), ("a/b", "selected_tags.csv"),
        ("a/b", "c/model_optimized.onnx"), ("a/b", "c/tag_mapping.json"),
    ]  # fmt: skip
    write_model(home / "a_b" / "model.onnx")
    (home / "model.onnx").write_bytes(b"stale")
    assert tag(images, "--repo_id", "a/b", "--model_dir", home) == 0
    assert len(asked) == 4
    assert str(home / "model.onnx") in capfd.readouterr().err


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ("no model", "onnx-model-missing"),
        ("no table", "tag-table-missing"),
        ("other table", "tag-table-of-other-model"),
        ("no onnx", "onnx-model-invalid"),
        ("no images", "image-folder-empty"),
        ("no folder", "image-folder-missing"),
        ("another output", "metadata-file-invalid"),
    ],
)
def test_faults(images: Path, tmp_path: Path, codes: list[str], change: str, code: str) -> None:
    model, output = write_model(tmp_path / "model" / "m.onnx"), tmp_path / "tags.json"
    table = model.with_name("selected_tags.csv")
    if change == "no model":
        model.unlink()
    elif change == "no table":
        table.unlink()
    elif change == "other table":
        table.write_text(CSV + "9,more,0,1\n")
    elif change == "no onnx":
        model.write_bytes(b"no model")
    elif change == "no images":
        for path in images.glob("*.png"):
            path.unlink()
    elif change == "no folder":
        images = tmp_path / "absent"
    else:
        output.write_text("[1]")
    assert tag(images, "--model_file", model, "--output_path", output) == 2
    assert codes == [code]
    assert output.exists() == (change == "another output")


def test_without_the_package(images: Path, tmp_path: Path, codes: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_model(tmp_path / "m.onnx")
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    assert tag(images, "--model_file", model) == 2
    assert codes == ["onnx-package-missing"]


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_cannot_be_written(images: Path, tmp_path: Path, codes: list[str]) -> None:
    images.chmod(0o555)
    assert tag(images, "--model_file", write_model(tmp_path / "m.onnx")) == 2
    images.chmod(0o755)
    assert codes == ["folder-not-writable"]


def test_decoding_stays_ahead_by_two_batches(images: Path) -> None:
    read: list[str] = []
    reader = ImageReader(prepare=lambda _, path: read.append(path), batch_size=2, workers=1, faults=[])
    batches = reader.read_batches([images / "red.png"] * 20)
    assert [next(batches)[0] for _ in range(2)] == [2, 2]
    assert len(read) <= 8
    batches.close()
