"""Captions of images by any model of transformers that turns an image and a text into text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sfumato.sampling.image_models import open_image_model


@dataclass(frozen=True, kw_only=True)
class Wording:
    """How long a caption is, in tokens, and how its words are found: by beams, by chance among the likeliest, which
    together have the probability top_p, or, without either, the likeliest one by one.
    """

    max_tokens: int
    min_tokens: int = 0
    num_beams: int = 1
    top_p: float | None = None
    seed: int = 42

    @property
    def arguments(self) -> dict[str, Any]:
        """Of transformers' generate()."""
        chance = {"do_sample": False} if self.top_p is None else {"do_sample": True, "top_p": self.top_p, "top_k": 0}
        return {
            "max_new_tokens": self.max_tokens,
            "min_new_tokens": self.min_tokens,
            "num_beams": self.num_beams,
            **chance,
        }


@dataclass(frozen=True, kw_only=True)
class Captioner:
    """A model with its processor, as transformers opens them."""

    model: Any
    processor: Any
    wording: Wording

    @torch.no_grad()
    def make_captions(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[str]:
        """A caption of each image, on one line. prompts: as many; "" for a model that needs none."""
        torch.manual_seed(self.wording.seed)
        inputs = self.processor(images=list(images), **self._make_text(prompts), return_tensors="pt")
        inputs = inputs.to(self.model.device, self.model.dtype)
        tokens = self.model.generate(**inputs, **self.wording.arguments)
        texts = self.processor.batch_decode(self._remove_prompt(tokens, inputs), skip_special_tokens=True)
        return [remove_beginning(" ".join(text.split()), prompt) for text, prompt in zip(texts, prompts, strict=True)]

    def _make_text(self, prompts: Sequence[str]) -> dict[str, Any]:
        """The prompts as the model reads them: in a conversation, where it has a template for one."""
        if self.processor.chat_template:
            texts = [self._make_conversation(prompt) for prompt in prompts]
        elif not any(prompts):
            return {}
        else:
            texts = list(prompts)
        self.processor.tokenizer.padding_side = "left"  # what is generated follows the prompts
        return {"text": texts, "padding": True}

    def _make_conversation(self, prompt: str) -> str:
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        messages = [{"role": "user", "content": content}]
        return self.processor.apply_chat_template(messages, add_generation_prompt=True)

    def _remove_prompt(self, tokens: Tensor, inputs: Any) -> Tensor:
        """What follows the prompt, of models that give it back."""
        if "input_ids" not in inputs:
            return tokens
        given: Tensor = inputs["input_ids"]
        count = given.shape[1]
        return tokens[:, count:] if torch.equal(tokens[:, :count], given) else tokens


def remove_beginning(text: str, prompt: str) -> str:
    """Without the words of the prompt, which models in the way of BLIP go on from."""
    words = prompt.split()
    if words and text.lower().split()[: len(words)] == [word.lower() for word in words]:
        return " ".join(text.split()[len(words) :])
    return text


def load_captioner(name: str, wording: Wording, option: str, *, dtype: torch.dtype, device: torch.device) -> Captioner:
    """name: a folder, or OWNER/NAME on the hub. option: that gave it. UserError where there is no such model."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model, processor = open_image_model(
        name,
        AutoModelForImageTextToText,
        AutoProcessor,
        option=option,
        purpose="describes images",
        examples="BLIP, GIT or Qwen-VL",
        dtype=dtype,
    )
    return Captioner(model=model.to(device), processor=processor, wording=wording)
