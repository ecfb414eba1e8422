"""What full training has changed, as an adapter beside the saved model."""

from __future__ import annotations

from pathlib import Path

from sfumato.config import Config
from sfumato.errors import UserError
from sfumato.families.detection import describe_model
from sfumato.methods import make_method
from sfumato.tools.adapter_files.extract import ExtractRequest, extract_adapter
from sfumato.tools.adapter_files.models import ENCODER_OPTIONS


def extract_at_end(config: Config, saved: Path, output: Path, rank: int) -> list[str]:
    """Write the adapter of the difference between the base model and what was saved; the lines of the report.

    Both are read from their files, in the precision of these. UserError where the base model is gone, or nothing that
    an adapter may change has changed.
    """
    source = config.model.pretrained_model_name_or_path
    assert source is not None
    blueprint = describe_model(config)[1]
    named = make_method(config).list_generate_options(str(saved), blueprint)
    encoders = {option: str(named[option]) for option in ENCODER_OPTIONS.values() if option in named}
    request = ExtractRequest(
        original=source,
        tuned=str(saved),
        encoders={option: config.value(option) for option in encoders},
        tuned_encoders=encoders,
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
            f"training is complete, {saved} is saved, but {output.name} is not: {error.what}",
            code=error.code,
            fix=error.fix,
        ) from error
