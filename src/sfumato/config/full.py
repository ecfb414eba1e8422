"""Options of training the whole model."""

from __future__ import annotations

from sfumato.config.base import Options, option


class FullOptions(Options):
    """Training the whole model"""

    train_text_encoder: bool = option(False, "train the text encoders, too")
    stop_text_encoder_training: int | None = option(
        None, "step after which the text encoders stay as they are; -1 for not training them at all", ge=-1
    )
    no_token_padding: bool = option(
        False, "do not fill up short captions with padding; refused, for pictures are made with it"
    )

    @property
    def trains_text(self) -> bool:
        """Whether text encoders train, for the first steps at least."""
        stop = self.stop_text_encoder_training
        return self.train_text_encoder and (stop is None or stop > 0)
