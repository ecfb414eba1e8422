"""All scripts of sd-scripts that work on files of models and on images, by name."""

from __future__ import annotations

from pathlib import PurePath

from sfumato.common.names import SCRIPT_ALIASES
from sfumato.compat.adapter_tools import ADAPTER_TOOLS
from sfumato.compat.bucket_tool import BUCKET_TOOLS
from sfumato.compat.caption_tools import CAPTION_TOOLS
from sfumato.compat.file_tool import FileTool
from sfumato.compat.model_tools import MODEL_TOOLS

FILE_TOOLS = {tool.name: tool for tool in (*ADAPTER_TOOLS, *MODEL_TOOLS, *CAPTION_TOOLS, *BUCKET_TOOLS)}


def find_file_tool(name: str) -> FileTool | None:
    """The script of a name, with or without .py; None for other scripts."""
    plain = PurePath(name).as_posix().removesuffix(".py")
    return FILE_TOOLS.get(SCRIPT_ALIASES.get(plain, plain))
