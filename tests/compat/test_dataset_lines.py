"""The command lines that guides for datasets show, in words of our own: they run, and leave what they promise."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest

from data.conftest import write_image
from families.toys import ToyShelf
from sfumato.compat.launch import main as launch
from tools.test_caption_images import save_blip
from tools.test_tag_images import write_model

TAGGER = "finetune/tag_images_by_wd14_tagger.py"
MERGE = "finetune/merge_captions_to_metadata.py"
BUCKETS = "finetune/prepare_buckets_latents.py"
CAPTIONS = "finetune/make_captions.py"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `train`, in which there are three images, one of them deeper, with tags beside the first."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for seed, name in enumerate(("a", "b", "inner/c")):
        write_image(tmp_path / "train" / f"{name}.png", (96, 64), seed, caption="mine")
    (tmp_path / "train" / "b.txt").unlink()
    (tmp_path / "train" / "inner" / "c.txt").unlink()
    return tmp_path


def run(line: str) -> None:
    assert launch(shlex.split(line)) == 0


@pytest.fixture(scope="module")
def taggers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of models, as the tagger keeps those that it has downloaded."""
    folder = tmp_path_factory.mktemp("models")
    for repo in ("wd-v1-4-convnext-tagger-v2", "wd-swinv2-tagger-v3", "wd-vit-tagger-v3"):
        write_model(folder / f"SmilingWolf_{repo}" / "model.onnx", batch=1 if repo.endswith("v2") else "N")
    inner = folder / "cella110n_cl_tagger_cl_tagger_1_01" / "cl_tagger_1_01"
    write_model(inner / "model_optimized.onnx", is_mapping=True)
    return folder


CL = "cella110n/cl_tagger/cl_tagger_1_01"
ENDS = "--use_rating_tags_as_last_tag --character_tags_first --character_tag_expand --always_first_tags '1girl,1boy'"
OTHERS = "--copyright_threshold 0.5 --artist_threshold 0.5 --meta_threshold 2 --model_threshold 2"
REPLACED = r"--tag_replacement 'red_tag,red\, bright;blue_tag,blue' --caption_extention .tags"
TAGGER_LINES = {  # -> the images that have tags afterwards
    f"{TAGGER} --batch_size 4 train": "ab",
    f"{TAGGER} train --onnx --repo_id SmilingWolf/wd-swinv2-tagger-v3 --batch_size 4": "ab",
    f"{TAGGER} --onnx --repo_id SmilingWolf/wd-vit-tagger-v3 --recursive --remove_underscore train": "abc",
    f"{TAGGER} --onnx --general_threshold 0.4 --character_threshold 0.85 --caption_extension=.txt train": "ab",
    f"{TAGGER} --batch_size 8 --max_data_loader_n_workers 2 --undesired_tags 'red_tag,blue_tag' train --debug": "ab",
    f"{TAGGER} train --append_tags --frequency_tags --caption_separator ', '": "ab",
    f"{TAGGER} train {ENDS}": "ab",
    f"{TAGGER} train --onnx --repo_id {CL} --use_quality_tags {OTHERS}": "ab",
    f"{TAGGER} train --recursive --output_path tags.jsonl": "",
    f"tag_image_by_wd14_tagger.py train {REPLACED}": "",
}


@pytest.mark.parametrize("line", TAGGER_LINES, ids=range(len(TAGGER_LINES)))
def test_the_tagger(here: Path, taggers: Path, line: str) -> None:
    shutil.copytree(taggers, here / "wd14_tagger_model")
    run(line)
    written = {path.stem: path.read_text() for path in (here / "train").rglob("*.txt")}
    wanted = TAGGER_LINES[line]
    assert set(written) == set(wanted) | {"a"}
    if "--append_tags" in line:
        assert written["a"].startswith("mine")
    elif wanted:
        assert "mine" not in written["a"]
    elif ".jsonl" in line:
        rows = [json.loads(text) for text in (here / "tags.jsonl").read_text().splitlines()]
        assert [Path(row["image_path"]).stem for row in rows] == ["a", "b", "c"]
    else:
        assert {path.stem for path in (here / "train").glob("*.tags")} == {"a", "b"}


MERGE_LINES = {
    f"{MERGE} train meta_cap.json": ["a", "b"],
    f"{MERGE} --full_path train meta_cap.json": ["train/a.png", "train/b.png"],
    f"{MERGE} train meta_cap.json --in_json meta_old.json": ["a", "b", "old"],
    f"{MERGE} --caption_extension .cap --recursive train meta_cap.json": ["a", "b", "c"],
    f"{MERGE} train meta_cap.json --recursive --full_path --debug": ["train/a.png", "train/b.png", "train/inner/c.png"],
    f"{MERGE} train meta_cap.json --caption_extention=.cap": ["a", "b"],
}


@pytest.mark.parametrize("line", MERGE_LINES, ids=range(len(MERGE_LINES)))
def test_merging_captions(here: Path, line: str) -> None:
    (here / "meta_old.json").write_text('{"old": {"caption": "x"}}')
    for path in (here / "train").rglob("*.png"):
        path.with_suffix(".cap" if ".cap " in f"{line} " else ".caption").write_text(f"a photo of {path.stem}\n")
    run(line)
    entries = json.loads((here / "meta_cap.json").read_text())
    assert sorted(entries) == MERGE_LINES[line]
    assert all(entry["caption"] in ("x", f"a photo of {Path(key).stem}") for key, entry in entries.items())


SMALL = "--max_resolution 128,128 --min_bucket_reso 64"
BUCKET_LINES = (
    f"{BUCKETS} train meta_clean.json meta_lat.json MODEL --batch_size 4 --max_resolution 512,512 --mixed_precision no",
    f"{BUCKETS} --full_path train meta_full.json meta_lat.json MODEL --max_resolution 64,64 --min_bucket_reso 64",
    f"{BUCKETS} train meta_clean.json meta_lat.json MODEL --max_resolution=128,128 --min_bucket_reso=64 --flip_aug",
    f"{BUCKETS} train meta_clean.json meta_lat.json MODEL {SMALL} --bucket_no_upscale --max_bucket_reso 256",
    f"{BUCKETS} train meta_clean.json meta_lat.json MODEL {SMALL} --skip_existing --max_data_loader_n_workers 2",
    f"{BUCKETS} --recursive train meta_deep.json meta_lat.json MODEL {SMALL} --bucket_reso_steps 64",
    f"{BUCKETS} train meta_clean.json meta_clean.json MODEL --v2 --alpha_mask --mixed_precision bf16 {SMALL}",
)


@pytest.fixture(scope="module")
def model(toy_shelf: ToyShelf) -> Path:
    return toy_shelf.paths("sd")["pretrained_model_name_or_path"]


@pytest.mark.full
@pytest.mark.parametrize("line", BUCKET_LINES, ids=range(len(BUCKET_LINES)))
def test_preparing_buckets(here: Path, model: Path, line: str) -> None:
    entries = {"a": {"caption": "x", "tags": "y"}, "b": {"caption": "x"}}
    (here / "meta_clean.json").write_text(json.dumps(entries))
    (here / "meta_deep.json").write_text(json.dumps({**entries, "inner/c": {"caption": "x"}}))
    full = {str(here / "train" / f"{key}.png"): entry for key, entry in entries.items()}
    (here / "meta_full.json").write_text(json.dumps(full))
    run(line.replace("MODEL", str(model)))
    output = "meta_clean.json" if "meta_lat.json" not in line else "meta_lat.json"
    found = json.loads((here / output).read_text())
    assert len(found) == (3 if "meta_deep" in line else 2)
    sizes = {tuple(entry["train_resolution"]) for entry in found.values()}
    assert len(sizes) == 1
    assert all(side % 8 == 0 for side in next(iter(sizes)))
    assert next(iter(found.values()))["tags"] == "y"


CAPTION_LINES = (
    f"{CAPTIONS} --batch_size 2 train --caption_weights MODEL --max_length 5 --min_length 2",
    f"{CAPTIONS} --caption_weights MODEL --beam_search --num_beams 3 --max_length 5 --min_length 2 train",
    f"{CAPTIONS} train --caption_weights MODEL --top_p 0.9 --seed 7 --caption_extention=.caption --max_length 5",
    f"{CAPTIONS} train --caption_weights=MODEL --recursive --max_data_loader_n_workers=2 --max_length=5 --num_beams=1",
)


@pytest.mark.full
@pytest.mark.parametrize("line", CAPTION_LINES, ids=range(len(CAPTION_LINES)))
def test_making_captions(here: Path, line: str) -> None:
    save_blip(here / "blip")
    run(line.replace("MODEL", str(here / "blip")))
    written = {path.stem: path.read_text() for path in (here / "train").rglob("*.caption")}
    assert set(written) == set("abc" if "--recursive" in line else "ab")
    assert all(text.count("\n") == 1 for text in written.values())
