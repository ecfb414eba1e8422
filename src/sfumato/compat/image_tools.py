"""sd-scripts' scripts that make images, run as `sfumato generate`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePath
from typing import Any

from sfumato.cli.generate import ALIASES, COMMAND_THEMES, HIGHLIGHTS, run_generate
from sfumato.cli.generate_terminal import Terminal
from sfumato.cli.help import asks_for_help, command_help
from sfumato.common.names import SCRIPT_ALIASES
from sfumato.compat.image_tool_options import (
    ABSENT_IN_GEN_IMG,
    FluxInferenceOptions,
    GenImgAbsentOptions,
    GenImgOptions,
    InpaintingInferenceOptions,
    LuminaInferenceOptions,
    Sd3InferenceOptions,
    SdxlGenImgOptions,
    SdxlInferenceOptions,
    take_gen_img,
    take_minimal,
)
from sfumato.config.base import Options
from sfumato.config.command import NO_TRIALS, CommandLine, read_command

Changes = tuple[dict[str, Any], dict[str, Any]]  # of the command's own options, and defaults of prompts


@dataclass(frozen=True, kw_only=True)
class ImageTool:
    """One script. take: its own options -> those of `sfumato generate` and defaults of prompts."""

    name: str
    options: type[Options]
    take: Callable[[Any, CommandLine], Changes]
    family: str | None = None  # None: the checkpoint says which
    defaults: Mapping[str, Any] = field(default_factory=dict)  # of further options
    refused: Sequence[type[Options]] = ()  # themes of options in `absent` that no other command has
    absent: Mapping[str, str] = field(default_factory=dict)  # option that it does not have here -> why
    no_effect: Mapping[str, str] = field(default_factory=dict)  # option -> why it changes nothing
    aliases: Mapping[str, str] = field(default_factory=dict)
    terminal: Terminal = field(default_factory=Terminal)

    def start(self, argv: Sequence[str]) -> int:
        """Read the command line and run; gives the exit code."""
        aliases = {**ALIASES, **self.aliases}
        if asks_for_help(argv):
            text = command_help(
                f"{self.name}.py", self.options, *COMMAND_THEMES, highlights=HIGHLIGHTS, aliases=aliases
            )
            sys.stdout.write(text)
            return 0
        themes = (self.options, *self.refused, *COMMAND_THEMES)
        line = read_command(argv, *themes, aliases=aliases, absent={**NO_TRIALS, **self.absent})
        for name, reason in self.no_effect.items():
            if name in line.own and line.own[name] != self.options.model_fields[name].default:
                sys.stderr.write(f"note: --{name} has no effect: {reason}\n")
        own, prompt_defaults = self.take(line.options(self.options), line)
        line = replace(line, own={**line.own, **own})
        defaults = {**self.defaults, **({"family": self.family} if self.family else {})}
        return run_generate(line, defaults=defaults, prompt_defaults=prompt_defaults, terminal=self.terminal)


MEMORY = "networks are on the device only while they are needed"
ONE_DTYPE = dict.fromkeys(
    ("clip_l_dtype", "ae_dtype", "flux_dtype", "gemma2_dtype", "device"),
    "--dtype holds for all networks but those that need more, and the device is found",
)
GEN_IMG_NO_EFFECT = {
    "v1": "the checkpoint says it",
    "no_preview": "there is no window with previews",
    "network_module": "the files say what they are",
    "network_args": "the files say what they are",
    "opt_channels_last": "torch chooses the layout of memory",
}
INTERACTIVE = Terminal(
    names={"m": "am", "c": "l"},
    carried=("width", "height", "sample_steps", "guidance_scale", "scale"),
    ends_at_empty_line=True,
)
IMAGE_TOOLS = {
    tool.name: tool
    for tool in (
        ImageTool(
            name="gen_img",
            options=GenImgOptions,
            take=take_gen_img,
            aliases={"control_net_weights": "control_net_multipliers"},
            refused=(GenImgAbsentOptions,),
            absent=ABSENT_IN_GEN_IMG,
            no_effect=GEN_IMG_NO_EFFECT,
        ),
        ImageTool(
            name="sdxl_gen_img",
            options=SdxlGenImgOptions,
            take=take_gen_img,
            family="sdxl",
            aliases={"control_net_weights": "control_net_multipliers"},
            refused=(GenImgAbsentOptions,),
            absent=ABSENT_IN_GEN_IMG,
            no_effect=GEN_IMG_NO_EFFECT,
        ),
        ImageTool(
            name="sdxl_minimal_inference",
            options=SdxlInferenceOptions,
            take=take_minimal,
            family="sdxl",
            aliases={"ckpt_path": "pretrained_model_name_or_path", "prompt2": "prompt_2"},
            terminal=Terminal(questions=("prompt", "prompt_2", "negative_prompt", "seed")),
        ),
        ImageTool(
            name="sd3_minimal_inference",
            options=Sd3InferenceOptions,
            take=take_minimal,
            family="sd3",
            defaults={"seed": 1},
            no_effect={"offload": MEMORY},
            aliases={
                "ckpt_path": "pretrained_model_name_or_path",
                "cfg_scale": "scale",
                "t5xxl_token_length": "t5xxl_max_token_length",
            },
            terminal=INTERACTIVE,
        ),
        ImageTool(
            name="flux_minimal_inference",
            options=FluxInferenceOptions,
            take=take_minimal,
            no_effect={"offload": MEMORY, **ONE_DTYPE},
            aliases={"ckpt_path": "pretrained_model_name_or_path", "cfg_scale": "scale"},
            terminal=INTERACTIVE,
        ),
        ImageTool(
            name="inpainting_minimal_inference",
            options=InpaintingInferenceOptions,
            take=take_minimal,
            aliases={"ckpt_path": "pretrained_model_name_or_path"},
        ),
        ImageTool(
            name="lumina_minimal_inference",
            options=LuminaInferenceOptions,
            take=take_minimal,
            family="lumina",
            no_effect={"offload": MEMORY, **ONE_DTYPE},
            aliases={"gemma2_path": "gemma2", "ae_path": "ae"},
            terminal=replace(INTERACTIVE, names={"m": "am", "g": "l"}),
        ),
    )
}


def find_image_tool(name: str) -> ImageTool | None:
    """The script of a name, with or without .py; None for other scripts."""
    plain = PurePath(name).as_posix().removesuffix(".py")
    return IMAGE_TOOLS.get(SCRIPT_ALIASES.get(plain, plain))
