"""Options of the captions: where they are read from and what is changed in them at each step."""

from __future__ import annotations

from sfumato.config.base import Options, option


class CaptionOptions(Options):
    """Captions"""

    caption_extension: str = option(".caption", "ending of the caption files beside the images")
    caption_separator: str = option(",", "what separates the tags of a caption")
    caption_prefix: str | None = option(None, "text put before every caption")
    caption_suffix: str | None = option(None, "text put after every caption")
    shuffle_caption: bool = option(False, "shuffle the tags at every step")
    keep_tokens: int = option(0, "the first N tags are neither shuffled nor dropped", ge=0)
    keep_tokens_separator: str = option(
        "", "mark that ends the fixed tags at the start; a second one begins fixed tags at the end"
    )
    secondary_separator: str | None = option(None, "mark that joins several tags into one for shuffling and dropping")
    enable_wildcard: bool = option(False, "choose one of {a|b|c}, and one line of a caption with several")
    token_warmup_min: int = option(1, "tags in use at the first step of the warm-up", ge=0)
    token_warmup_step: float = option(0, "step from which all tags are in use; below 1 a share of all steps", ge=0)
    caption_dropout_rate: float = option(0.0, "chance of an empty caption", ge=0, le=1)
    caption_dropout_every_n_epochs: int = option(0, "empty captions in every Nth epoch; 0 for none", ge=0)
    caption_tag_dropout_rate: float = option(0.0, "chance to leave out each tag", ge=0, le=1)
    weighted_captions: bool = option(False, "(words) and [words] in captions count more and less")
    clip_l_dropout_rate: float = option(0.0, "chance to leave out CLIP-L's text", ge=0, le=1)
    clip_g_dropout_rate: float = option(0.0, "chance to leave out CLIP-G's text", ge=0, le=1)
    t5_dropout_rate: float = option(0.0, "chance to leave out T5's text", ge=0, le=1)

    @property
    def text_dropout(self) -> dict[str, float]:
        """Text encoder -> chance above 0 to be left out; its option is the encoder's name and _dropout_rate."""
        rates = {"clip_l": self.clip_l_dropout_rate, "clip_g": self.clip_g_dropout_rate, "t5": self.t5_dropout_rate}
        return {name: rate for name, rate in rates.items() if rate}
