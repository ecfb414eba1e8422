"""A tagger model in the ONNX format: where its files are, what images it takes, what it says of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sfumato.data.images import decode_layers
from sfumato.errors import UserError
from sfumato.tools.onnx_model import download_files, open_session
from sfumato.tools.tag_table import TagTable, check_outputs, read_tag_table

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

PLAIN_FILES = ("model.onnx", "selected_tags.csv")
MAPPING_FILES = ("model_optimized.onnx", "tag_mapping.json")  # of repositories named owner/name/folder
TABLE_FILES = ("selected_tags.csv", "tag_mapping.json")
DEFAULT_SIDE = 448  # pixels, where the model does not say what it takes
WHITE = (255, 255, 255)


def find_model_files(repo_id: str, folder: Path, *, force_download: bool) -> tuple[Path, Path]:
    """(model, table) of a repository on the hub, in a folder of their own inside `folder`; downloaded if missing."""
    owner, _, rest = repo_id.partition("/")
    name, _, inner = rest.partition("/")
    names = [f"{inner}/{file}" if inner else file for file in (MAPPING_FILES if inner else PLAIN_FILES)]
    own = folder / repo_id.replace("/", "_")
    paths = [own / name for name in names]
    if force_download or not all(path.is_file() for path in paths):
        download_files(f"{owner}/{name}", names, own, advice="give --model_file PATH with its table beside it")
    return paths[0], paths[1]


def list_stale_files(folder: Path) -> list[Path]:
    """Model files directly in the folder of all models, where they lay before each repository had its own."""
    return [path for name in (*PLAIN_FILES, *MAPPING_FILES) if (path := folder / name).is_file()]


def find_table(model: Path) -> Path:
    """The table beside a model file."""
    found = [path for name in TABLE_FILES if (path := model.parent / name).is_file()]
    if not found:
        raise UserError(
            f"no table of tags lies beside {model}",
            code="tag-table-missing",
            fix=f"put the model's {' or '.join(TABLE_FILES)} into {model.parent}",
        )
    return found[0]


@dataclass(frozen=True, kw_only=True)
class Tagger:
    """side: of the square images that the model takes, in pixels. batch_size: the only one that it takes, or None."""

    session: InferenceSession
    table: TagTable
    side: int
    batch_size: int | None
    channels_first: bool

    def read_pixels(self, data: bytes, path: str) -> NDArray[np.float32]:
        """A file's image as the model takes it: on white, padded to a square, blue before red; 0 to 255, or -1 to 1."""
        return self.arrange(prepare_image(data, path, self.side))

    def arrange(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        """(side, side, 3) RGB -> the layout of the model's input for one image."""
        reversed_channels = pixels[:, :, ::-1].astype(np.float32)
        if not self.table.is_mapping:
            return reversed_channels.transpose(2, 0, 1) if self.channels_first else reversed_channels
        return reversed_channels.transpose(2, 0, 1) / np.float32(127.5) - 1

    def predict(self, images: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
        """(number of images, number of tags), probabilities."""
        count = len(images)
        filled = [*images, *[images[-1]] * ((self.batch_size or count) - count)]  # a fixed batch is always full
        (name,) = (each.name for each in self.session.get_inputs())
        output = np.asarray(self.session.run(None, {name: np.stack(filled)})[0], np.float32)[:count]
        return np.asarray(1 / (1 + np.exp(-output)), np.float32) if self.table.is_mapping else output


def load_tagger(model: Path, table: Path) -> Tagger:
    """UserError where onnxruntime is missing, the file is no such model, or the table belongs to another one."""
    tags = read_tag_table(table)
    session = open_session(model, purpose="tagging")
    inputs, outputs = session.get_inputs(), session.get_outputs()
    if len(inputs) != 1 or len(inputs[0].shape) != 4:
        raise UserError(
            f"{model} takes no batch of images",
            code="tagger-without-images",
            fix="give the ONNX file of a tagger model",
        )
    width = outputs[0].shape[-1]
    if isinstance(width, int):
        check_outputs(tags, width, table)
    batch, *shape = inputs[0].shape
    channels_first = shape[0] == 3
    side = shape[1]
    return Tagger(
        session=session,
        table=tags,
        side=side if isinstance(side, int) else DEFAULT_SIDE,
        batch_size=batch if isinstance(batch, int) and batch > 0 else None,
        channels_first=channels_first,
    )


def prepare_image(data: bytes, path: str, side: int) -> NDArray[np.uint8]:
    """(side, side, 3) RGB: transparent parts on white, the picture in the middle of a white square."""
    image, alpha = decode_layers(data, path, alpha=True)
    if alpha is not None:
        image = Image.composite(image, Image.new("RGB", image.size, WHITE), alpha)
    longest = max(image.size)
    square = Image.new("RGB", (longest, longest), WHITE)
    square.paste(image, ((longest - image.width) // 2, (longest - image.height) // 2))
    resampling = Image.Resampling.BOX if longest > side else Image.Resampling.LANCZOS
    return np.asarray(square.resize((side, side), resampling))
