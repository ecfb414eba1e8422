"""--masked_loss in every training script: a mask of nothing leaves no loss."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from families.toys import ToyShelf
from sfumato.compat.launch import main
from sfumato.compat.scripts import SCRIPTS
from toy_runs import make_arguments, make_images, read_metrics


@pytest.mark.full
@pytest.mark.parametrize("name", [name for name, script in SCRIPTS.items() if script.method != "leco"])  # no images
def test_a_mask_of_nothing(name: str, toy_shelf: ToyShelf, tmp_path: Path) -> None:
    script = SCRIPTS[name]
    images = make_images(tmp_path / "images", 2)
    masks = tmp_path / "masks"
    masks.mkdir()
    rows: dict[str, dict[str, str]] = {}
    for path in (images / "2_cat").glob("*.png"):
        Image.fromarray(np.zeros(Image.open(path).size[::-1], np.uint8)).save(masks / path.name)
        rows[path.name] = {"caption": "a cat"}
    options = {"masked_loss": True, "conditioning_data_dir": masks, "max_train_steps": 1}
    if script.method != "adapter":
        options |= {"network_dim": None}
    if script.method == "textual_inversion":
        options |= {"token_string": "zwx", "use_object_template": True, "save_model_as": "pt"}
    if script.method in ("control_net", "lllite"):  # whose masks are alpha channels, beside the control images
        options |= {"alpha_mask": True}
        for path in (images / "2_cat").glob("*.png"):
            image = Image.open(path)
            image.putalpha(0)
            image.save(path)
    if "in_json" in script.options:
        (tmp_path / "rows.json").write_text(json.dumps(rows))
        options |= {"in_json": tmp_path / "rows.json", "train_data_dir": images / "2_cat"}
    toy = toy_shelf.paths(script.family or "flux")
    assert main([name, *make_arguments(toy, images, tmp_path / "out", **options)]) == 0
    assert [row["loss/current"] for row in read_metrics(tmp_path / "out")] == [0]
