"""--extract_lora_at_end: what full training has changed, as an adapter beside the saved model."""

from __future__ import annotations

from pathlib import Path

from sfumato.config import Config
from sfumato.errors import UserError
from sfumato.tools.adapter_files.extract import ExtractRequest, extract_adapter

NAME_END = "_lora.safetensors"


def extract_at_end(config: Config, saved: Path) -> list[str]:
    """Write the adapter of the difference between the base model and what was saved; the lines of the report.

    Both are read from their files, in the precision of these. UserError where the base model is gone, or nothing that
    an adapter may change has changed.
    """
    source, rank = config.model.pretrained_model_name_or_path, config.save.extract_lora_at_end
    assert source is not None
    assert rank is not None
    output = saved.with_name(config.save.output_name + NAME_END)
    request = ExtractRequest(
        original=source,
        tuned=str(saved),
        output=output,
        rank=rank,
        precision=config.save.save_precision or "float",
        family=config.model.model_type or config.run.family,
        minimal_metadata=config.save.no_metadata,
    )
    try:
        return extract_adapter(request)
    except UserError as error:
        raise UserError(
            f"{saved} is complete, but --extract_lora_at_end failed: {error.what}", code=error.code, fix=error.fix
        ) from error
