"""Options of the run: what is trained, for how long, where it starts, and on how many devices."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator

from sfumato.config.base import Options, option
from sfumato.config.values import FilePath, Resolution, Seed, parse_int_choice

ADAPTER_METHODS = ("adapter", "leco", "image_slider")  # those that write an adapter file
PAIR_METHODS = ("image_slider",)  # those that learn from pairs of images
CONTROL_METHODS = ("control_net", "lllite")  # those that learn from control images


class RunOptions(Options):
    """The run"""

    family: str | None = option(None, "model family; default: detected from the checkpoint")
    method: Literal["adapter", "full", "textual_inversion", "control_net", "lllite", "leco", "image_slider"] = option(
        "adapter",
        "what is trained: an adapter, also from prompts or pairs of images; the full model, new words, a ControlNet, "
        "LLLite",
    )
    config_file: FilePath | None = option(
        None,
        "TOML or JSON file with options as keys; section names are free, .toml is appended if missing",
        path="file",
    )
    preset: str | None = option(
        None, "options of this preset, under those of the file and the command line; `sfumato presets` lists them"
    )
    plot_timesteps: FilePath | None = option(
        None, "plot the timestep distribution and the loss weights to a PNG file of this name"
    )
    show_timesteps: Literal["console", "image"] | None = option(
        None, "print the timestep distribution, or draw OUTPUT_NAME.timesteps.png into --output_dir, and exit"
    )
    show_timesteps_resolution: Resolution | None = option(
        None, "with --show_timesteps: the size of an image; by default those of the dataset"
    )
    show_timesteps_offset: float = option(0.0, "with --show_timesteps: an offset of timesteps like that of a subset")
    plan: bool = option(
        False, "check everything, show what the run would do, and exit; no weight is read, no file is written"
    )
    dry_run: bool = option(
        False, "take one real step, a preview and a save on the largest batch, show what each needs, and leave nothing"
    )
    output_config: bool = option(False, "write the given options to --config_file, which must not exist, and exit")

    @property
    def takes_control(self) -> bool:
        """Whether the images of conditioning_data_dir are control images, not masks."""
        return self.method in CONTROL_METHODS

    @property
    def has_pairs(self) -> bool:
        """Whether the images of reference_data_dirs are those with less of an attribute, and not the model's input."""
        return self.method in PAIR_METHODS


class LoopOptions(Options):
    """Length of training"""

    max_train_steps: int = option(1600, "optimizer steps", ge=1)
    max_train_epochs: int | None = option(None, "training epochs; takes precedence over --max_train_steps", ge=1)
    gradient_accumulation_steps: int = option(1, "batches per optimizer step", ge=1)
    max_bad_steps: int = option(5, "consecutive steps with a non-finite loss or gradients before training stops", ge=1)
    seed: Seed | None = option(None, "random seed; default: random, and reported")
    initial_epoch: int | None = option(None, "epoch to start from, counted from 1; earlier ones count as done", ge=1)
    initial_step: int | None = option(
        None, "step after which training starts; takes precedence over --initial_epoch and the step of a state", ge=0
    )
    skip_until_initial_step: bool = option(
        False, "skip the data of the steps before the initial step; by default only the step number changes"
    )


ZeroStage = Annotated[Literal[0, 1, 2, 3], BeforeValidator(parse_int_choice)]

NO_DDP_WRAPPER = "gradients are reduced after backward, without DistributedDataParallel"


class ProcessOptions(Options):
    """Several devices"""

    ddp_timeout: int | None = option(
        None, "minutes that processes wait for each other to start and within a step", ge=1
    )
    ddp_gradient_as_bucket_view: bool = option(
        False, "gradients are views of the communication buffers", no_effect=NO_DDP_WRAPPER
    )
    ddp_static_graph: bool = option(False, "every step uses the same parameters", no_effect=NO_DDP_WRAPPER)
    fsdp: bool = option(
        False,
        "share out the denoiser's weights, gradients and optimizer state over the processes, by torch's FSDP2",
    )
    fsdp_offload_params: bool = option(False, "with --fsdp: keep them in main memory until they are needed")
    deepspeed: bool = option(False, "let DeepSpeed's engine take the steps and share out what --zero_stage says")
    zero_stage: ZeroStage = option(
        2, "what is shared out: 1 the optimizer state, 2 gradients, too, 3 the denoiser's weights, too"
    )
    offload_optimizer_device: Literal["cpu", "nvme"] | None = option(
        None, "device to offload the optimizer state to (ZeRO)"
    )
    offload_optimizer_nvme_path: FilePath | None = option(None, "folder for optimizer state offloaded to NVMe")
    offload_param_device: Literal["cpu", "nvme"] | None = option(
        None, "device to offload the parameters to (ZeRO stage 3)"
    )
    offload_param_nvme_path: FilePath | None = option(None, "folder for parameters offloaded to NVMe")
    zero3_init_flag: bool = option(
        False, "shard the model while it is built", no_effect="each process reads the weights, then keeps its part"
    )
    zero3_save_16bit_model: bool = option(
        False, "save the model in 16 bits", no_effect="--save_precision says in what models are saved, whole"
    )
    fp16_master_weights_and_gradients: bool = option(False, "keep master weights and gradients in float16")
