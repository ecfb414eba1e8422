"""Write docs/adapters.md: the kinds of adapters, which to take when, their sizes, on which families: `make pages`."""

from __future__ import annotations

import json
import sys
from itertools import chain
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "adapters.md"
MEASURED = ROOT / "benchmarks" / "adapters.json"  # benchmarks/adapters.py writes it
sys.path[:0] = [str(ROOT / "tests")]
from adapters.cells import (  # pyright: ignore[reportMissingImports]
    FAMILIES,
    IN_DIFFUSERS,
    IN_ITS_PLACE,
    KINDS,
    REFUSED,
)
from sfumato.adapters.base import AdapterRequest
from sfumato.adapters.kinds import choose_kinds, create_adapter, list_kinds, list_related
from sfumato.families import _unet, sdxl
from sfumato.families.published import build_published, read_published
from sfumato.formats.groups import LayerGroup, find_layers

MODELS = {"sdxl": "Stable Diffusion XL", "flux-dev": "FLUX.1 dev"}
DIMS = {"oft": 4, "diag_oft": 4, "boft": 80, "oft_v2": 32, "boft_v2": 8}  # else 16, with alpha 16
WHEN = {  # kind -> --network_module and --network_args, when to take it
    "lora": ("`networks.lora`", "The first choice: every program reads it."),
    "lora_fa": ("`networks.lora_fa`", "LoRA in less memory: the inputs of linear layers are not kept."),
    "dylora": (
        "`networks.dylora unit=4`",
        "When the rank is to be chosen afterwards: its first ranks are a LoRA, too.",
    ),
    "split_lora": ("`split_qkv=True`", "Fused layers whose parts are to learn apart; a file of n times the rank."),
    "tucker_lora": ("`use_tucker=True`", "A LoRA of convolutions (`conv_dim`) in much smaller files."),
    "pissa": ("`pissa=True`", "A LoRA that starts from the largest parts of the weights; lower learning rates."),
    "dora": ("`dora_wd=True`", "Lengths of rows train apart from their directions; a step takes longer."),
    "trained_scalar": ("`use_scalar=True`", "LyCORIS' way to start: all matrices drawn, one factor from 0 on."),
    "loha": ("`networks.loha`, `algo=loha`", "Its rank is up to the square of dim: small dims (4 to 8) do."),
    "lokr": (
        "`networks.lokr`, `algo=lokr`",
        "Small files; with `full_matrix=True` and a small `factor` nearly the whole weight.",
    ),
    "full_difference": ("`algo=full`", "Full training as an adapter file: as large as the layers."),
    "norm_difference": (
        "`train_norm=True`, `norm_difference`",
        "Norm layers, beside the others of any kind; or, as the module, they alone.",
    ),
    "ia3": ("`algo=ia3 preset=ia3`", "One factor for each output, or input: no more can be learned, and little is."),
    "glora": ("`algo=glora`", "LoRA that also changes what goes into a layer."),
    "oft": (
        "`networks.oft`, `networks.oft_flux`",
        "Rotations: angles and lengths of what a layer computes stay; few blocks are large files.",
    ),
    "diag_oft": ("`algo=diag-oft`", "The same with small blocks and small files; `constraint` limits it."),
    "boft": ("`algo=boft`", "Stages of blocks that together mix all outputs."),
    "oft_v2": ("`networks.oft_v2`", "Rotations of inputs, without an inverse in a step."),
    "boft_v2": ("`networks.boft`", "Stages of rotations of inputs, as PEFT has them."),
}
HEAD = """# Adapters

`--network_module` chooses the kind, or `--network_module lycoris.kohya` with `--network_args algo=...`. What is in
the second column without a module is an argument of `networks.lora`; `dora_wd` and `use_scalar` are also arguments of
LoHa and LoKr, `train_norm` of all. All kinds go on from a file (`--network_weights`), resume bitwise, and are read by
`sfumato generate`, `--base_weights` and `--frozen_lora`. The arguments of each are in [options.md](options.md).

`algo=tlora` is refused: LyCORIS writes its matrices without the singular vectors that the change is a difference to,
and without saying which they were, so that no program can tell from a file what it changes.

`--network_dim` is the rank of some and the size or the number of blocks of others; where it cannot be, the error says
what can. Megabytes are those of a bf16 file for the U-Net of Stable Diffusion XL without convolutions, with the
`--network_dim` of the table and the arguments' defaults.

| Kind | How | dim | MB | When |
| --- | --- | --- | --- | --- |
"""
LEARNED = """
## What they have learned

The demo's lesson (ten images of a robot, see the README) with each kind on sfumato-tiny, from
`python benchmarks/adapters.py learn`. Recognized is the share of nine images of new prompts in which the classifier
sees the robot; others is the share of six images of other subjects in which it still sees these, and drift how much
those images have changed, of 255. One seed: differences of a tenth say nothing. Kinds that are not listed were not
measured yet.

| Kind | dim | learning rate | steps | kB | recognized | others | drift |
| --- | --- | --- | --- | --- | --- | --- | --- |
"""
REHEARSED = """
What a training step of one image of 1024 pixels needs, rehearsed at published size (bf16, AdamW, gradient
checkpointing, latents and text cached): `python benchmarks/adapters.py rehearse --kinds lokr` is
`sfumato plan --rehearse --published sdxl --network_module lokr ...`. None of these steps waits for the device.

| Kind | Model | dim | GB |
| --- | --- | --- | --- |
"""
LAYERS = """
## Which layers

* `--network_args include_patterns=... exclude_patterns=...`: regular expressions for all of a layer's name in adapter
  files, with dots and without the network's prefix. Alone, the first names the only layers that are adapted; together,
  it names the exceptions of the second.
* `network_reg_dims`, `network_reg_alphas` and `network_reg_lrs` (`expression=value,expression=value`) give layers
  ranks, alphas and learning rates; the last one that fits counts. An expression is searched in the name with `_`, or
  fits all of the name with dots. A rank of 0 leaves the layer as it is.
* `conv_dim`, or `enable_conv=True` for the rank of the other layers, adds the convolutions of U-Nets.
* LyCORIS' presets choose layers by `preset=...`.

## On which families

Each yes is a variant of `test_trains_resumes_and_is_taken_everywhere` in `tests/adapters/test_every_cell.py`: at toy
size, with the options in `tests/adapters/cells.py`, the loss of a batch falls, resume is bitwise, `--network_weights`
goes on from the file, and hooked as `sfumato generate` does it, or merged as `--base_weights` does it, the file changes
the model as it did in training. Each no is a variant of `test_what_a_family_cannot_have_is_said`. The last column says
whether diffusers loads what `sfumato lora convert --to diffusers` writes, with the same output (in the same test;
of DoRA and the factor around LoRA, with lengths of rows); it takes LoRA alone, and other kinds are refused.

"""


def page() -> str:
    labels = {name: list_kinds()[name].label for name in KINDS}
    groups, norms = list_sdxl_groups()
    rows: list[str] = []
    for name, (how, when) in WHEN.items():
        size = count_numbers(name, norms if list_kinds()[name].of_norms else groups) * 2 / 1e6
        rows.append(f"| {labels[name]} | {how} | {DIMS.get(name, 16)} | {size:,.0f} | {when} |\n")
    lines = ["| Kind | " + " | ".join(FAMILIES) + " | diffusers |\n", "| --- |" + " --- |" * (len(FAMILIES) + 1) + "\n"]
    for name, label in labels.items():
        cells = " | ".join(describe_cell(name, family) for family in FAMILIES)
        lines.append(f"| {label} | {cells} | {'yes' if name in IN_DIFFUSERS else 'no'} |\n")
    return HEAD + "".join(rows) + describe_measured(labels) + LAYERS + "".join(lines)


def describe_cell(kind: str, family: str) -> str:
    """Yes with its test, or no with the reason."""
    if family in REFUSED.get(kind, {}):
        return f"no: {REFUSED[kind][family][1]}"
    return f"yes (`{kind}-{family}`)"


def describe_measured(labels: dict[str, str]) -> str:
    """The tables of what was measured, in the order of the kinds."""
    stored = json.loads(MEASURED.read_text(encoding="utf-8"))
    learned, rehearsed = dict(stored["sfumato-tiny"]), ""
    rows = [f"| {labels[name]} | {describe_learned(learned[name])} |\n" for name in WHEN if name in learned]
    for model, title in MODELS.items():
        measured = {name: stored.get(model, {}).get(name) for name in WHEN}
        for name, found in measured.items():
            if found is None:  # not measured, or the model has no layer for the kind
                continue
            assert found["waits"] == 0, "the text says that no step waits"
            rehearsed += f"| {labels[name]} | {title} | {DIMS.get(name, 16)} | {found['peak'] / 1e9:.1f} |\n"
    return LEARNED + "".join(rows) + REHEARSED + rehearsed


def describe_learned(found: dict[str, Any]) -> str:
    """The cells of a row."""
    cells = [found["network_dim"], found["learning_rate"], found["steps"], f"{found['kilobytes']:,}"]
    return " | ".join(map(str, [*cells, *(found[name] for name in ("recognized", "others", "drift"))]))


def list_sdxl_groups() -> tuple[list[LayerGroup], list[LayerGroup]]:
    """The layers that LoRA adapts in the U-Net, on the meta device, and the norm layers."""
    config = read_published("sdxl")["networks"]["unet"]
    spec = sdxl._unet_spec(_unet.key_map(config))  # pyright: ignore[reportPrivateUsage]
    layers = find_layers(build_published(config))
    return spec.groups(layers), [group for group in spec.groups(layers, every=True) if group.is_norm]


def count_numbers(kind: str, groups: list[LayerGroup]) -> int:
    """In all tensors of a file."""
    name = "lora" if kind in IN_ITS_PLACE else kind
    wanted = {WHEN[kind][0].strip("`").partition("=")[0]: True} if kind in IN_ITS_PLACE else {}
    options: dict[str, Any] = {}
    for other, each in list_related(name).items():
        options[other] = each.options_class(**{k: wanted[k] for k in wanted if k in each.options_class.model_fields})
    dim, count = DIMS.get(kind, 16), 0
    for group in groups:
        request = AdapterRequest(rank=dim, alpha=16.0, options=options[name])
        adapter = create_adapter(choose_kinds(name, options, group), group, request, options)
        count += sum(tensor.numel() for tensor in chain(adapter.export_tensors().values()))
    return count


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
