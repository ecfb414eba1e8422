"""What `sfumato generate` does before it reads a model: its log, the options without effect, the folder for images."""

from __future__ import annotations

import logging

from sfumato.common.files import check_writable
from sfumato.config.secrets import collect_secrets
from sfumato.tools.generate_setup import GenerateRequest
from sfumato.tools.ignored_options import describe_ignored_options
from sfumato.track.console import configure_logging
from sfumato.training.image_metadata import OTHER_OPTIONS

log = logging.getLogger(__name__)
# The options that generating uses: all of these groups, and single ones of others.
GENERATE_THEMES = ("run", "model", "samples", "log")
GENERATE_OPTIONS = (*OTHER_OPTIONS, "network_weights", "seed", "resolution", "vae_batch_size")


def start_generating(request: GenerateRequest) -> None:
    """UserError where the folder cannot be written to."""
    config = request.config
    configure_logging(config.log, secrets=collect_secrets(config))
    ignored = describe_ignored_options(config, themes=GENERATE_THEMES, options=GENERATE_OPTIONS, purpose="images")
    for line in (*(f"note: {note}" for note in (*config.notes, *request.notes)), *ignored):
        log.info("%s", line)
    check_writable(request.outdir, option="--outdir")
