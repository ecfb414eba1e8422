"""Files that users name are opened by common/files.py alone; JSON and TOML are read by common/json_toml.py alone."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from house_rules import FILES, parsed_file, relative_name

OPENERS = {"open", "FileIO", "read_bytes", "read_text"}
PARSERS = {"json.load", "json.loads", "tomllib.load", "tomllib.loads", "np.load", "torch.load", "load_file"}
DOORS = {"common/files.py", "common/json_toml.py"}
REVIEWED = {  # (file, call) -> why it is safe
    ("formats/checkpoint_writer.py", "FileIO(temporary, 'w')"): "writes",
    ("data/find/index.py", "temporary.open('wb')"): "writes",
    ("data/find/index.py", "np.load(opened, allow_pickle=False)"): "of a file from the door",
    ("data/find/tar_source.py", "tarfile.open(fileobj=file, mode='r:', tarinfo=CheckedMember)"): "of one from the door",
    ("data/find/folders.py", "os.open(folder, os.O_RDONLY)"): "a folder",
    ("data/cache/shards.py", "os.open(folder / self.name, flags, 438)"): "makes a new file",
    ("data/cache/store.py", "os.open(path, os.O_RDWR | os.O_CREAT | BINARY, 438)"): "a lock, of which nothing is read",
    ("data/cache/store.py", "os.open(path, os.O_RDONLY | BINARY)"): "the same where nothing can be written",
    ("common/locks.py", "os.open(path, os.O_RDONLY | os.O_NONBLOCK)"): "a lock, of which nothing is read",
    ("common/run_lock.py", "self.path.open('a+b')"): "a lock of our own",
    ("data/find/image_formats.py", "Image.open(file, formats=formats)"): "of a file from the door",
    ("track/report_samples.py", "Image.open(file, formats=('PNG',))"): "of a file from the door",
    ("track/trackers.py", "path.open('a+b', buffering=0)"): "appends to a journal of our own",
    ("track/trackers.py", "self.path.open('a+b', buffering=0)"): "appends to a journal of our own",
    ("formats/safe_pickle.py", "torch.load(path, map_location='cpu', weights_only=True, mmap=is_zip)"): "checked",
    ("formats/pickled.py", "load_file(safetensors_path)"): "a file that was just written",
    ("parallel/meeting.py", "json.loads(self.store.get(key))"): "texts of our own processes",
    ("formats/metadata_limit.py", "json.loads(metadata[name])"): "texts of our own",
    ("families/diffusers_folder.py", "json.loads(module.config.to_json_string(use_diff=False))"): "a text of diffusers",
    ("families/_tokenizers.py", "SHIPPED_MERGES.read_bytes()"): "in this package",
    ("compat/scripts.py", "files('sfumato.compat').joinpath('options.json').read_text(encoding='utf-8')"): "ours",
    (
        "compat/scripts.py",
        "json.loads(files('sfumato.compat').joinpath('options.json').read_text(encoding='utf-8'))",
    ): "",
    ("config/presets.py", "json.loads(read_text_file(INDEX))"): "in this package",
    ("cli/exits.py", "os.open(os.devnull, os.O_WRONLY)"): "writes nowhere",
    ("tools/editor/run.py", "webbrowser.open(address)"): "our own address, in the browser",
    (
        "tools/editor/server.py",
        "files('sfumato.tools.editor').joinpath('page', file).read_bytes()",
    ): "one of this package",
    ("demo/demo.py", "path.read_text(encoding='utf-8')"): "the metrics of the demo's own run",
    ("demo/demo.py", "json.loads(line)"): "of these",
    ("demo/classifier.py", "json.loads(file.header.metadata['classes'])"): "in this package",
}


def side_doors(tree: ast.Module) -> Iterator[str]:
    """Calls that open or parse a file by themselves. One of bytes that are in memory (BytesIO) opens none."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        in_memory = bool(node.args) and ast.unparse(node.args[0]).startswith("BytesIO(")
        if (name.rpartition(".")[2] in OPENERS or name in PARSERS) and not in_memory:
            yield ast.unparse(node)


def test_files_are_opened_by_the_door() -> None:
    found: set[tuple[str, str]] = set()
    for path in FILES:
        if relative_name(path) not in DOORS:
            found |= {(relative_name(path), call) for call in side_doors(parsed_file(path))}
    assert not found - set(REVIEWED)
    assert not set(REVIEWED) - found, "no longer there"


@pytest.mark.parametrize(
    ("code", "calls"),
    [
        ("open(path)", 1),
        ("path.open('rb')", 1),
        ("Path(x).read_text()", 1),
        ("json.loads(text)", 1),
        ("Image.open(BytesIO(data))", 0),
        ("Image.open(path)", 1),
        ("open_file(path)", 0),
        ("decode_json(text)", 0),
    ],
)
def test_the_rule_catches(code: str, calls: int) -> None:
    assert len(list(side_doors(ast.parse(code)))) == calls
