"""LyCORIS' layers with values of a formula: what they give is stored in goldens/lycoris.json and compared with ours."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class LycorisCase:
    """One layer with one adapter. options: in LyCORIS' words."""

    algo: str
    conv: bool = False
    rank: int = 2
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        options = " ".join(f"{name}={value}" for name, value in self.options.items())
        return " ".join(filter(None, (self.algo, "conv" if self.conv else "linear", str(self.rank), options)))


DORA = {"weight_decompose": True, "wd_on_out": True}
OLD_DORA = {"weight_decompose": True, "wd_on_out": False}
LOKR_OPTIONS: tuple[dict[str, Any], ...] = (
    {}, {"factor": 4}, {"decompose_both": True}, {"full_matrix": True}, {"unbalanced_factorization": True},
    {"use_tucker": True}, DORA, OLD_DORA,
)  # fmt: skip
CASES = [
    *(LycorisCase(algo="lokr", conv=conv, options=options) for conv in (False, True) for options in LOKR_OPTIONS),
    LycorisCase(algo="lokr", rank=100),
    LycorisCase(algo="lokr", rank=100, conv=True, options=DORA),
    *(
        LycorisCase(algo="lora", conv=conv, options=options)
        for conv in (False, True)
        for options in ({}, {"use_tucker": True}, DORA, OLD_DORA)
    ),
    *(
        LycorisCase(algo=algo, conv=conv, options=options)
        for conv in (False, True)
        for algo, options in (("full", {}), ("glora", {}), ("ia3", {}), ("ia3", {"train_on_input": True}))
    ),
    *(
        LycorisCase(algo="loha", conv=conv, rank=3, options=options)
        for conv in (False, True)
        for options in ({}, {"use_tucker": True}, DORA, OLD_DORA)
    ),
    *(
        LycorisCase(algo=algo, conv=conv, rank=rank, options=options)
        for conv in (False, True)
        for algo, rank in (("diag-oft", 5), ("diag-oft", 4), ("boft", 11))
        for options in ({}, {"constraint": 0.03}, {"rescaled": True})
    ),
    *(LycorisCase(algo="norm", conv=conv) for conv in (False, True)),
]


def fill(tensor: Tensor, seed: float) -> Tensor:
    """Values between -0.5 and 0.5 of a formula, so that nothing but what comes out has to be stored."""
    numbers = torch.arange(tensor.numel(), dtype=torch.float64)
    return (torch.sin(numbers * 1.7 + seed) / 2).reshape(tensor.shape).to(tensor.dtype)


def make_layer(case: LycorisCase) -> nn.Module:
    if case.algo == "norm":
        layer = nn.GroupNorm(4, 12) if case.conv else nn.LayerNorm(12)
    else:
        layer = nn.Conv2d(12, 20, 3, padding=1, stride=2) if case.conv else nn.Linear(12, 20)
    with torch.no_grad():
        layer.weight.copy_(fill(layer.weight, 1.0))
        layer.bias.copy_(fill(layer.bias, 2.0))  # pyright: ignore[reportOptionalMemberAccess]
    return layer


def make_input(case: LycorisCase) -> Tensor:
    return fill(torch.empty(2, 12, 4, 4) if case.conv else torch.empty(3, 12), 3.0)


def fill_tensors(shapes: dict[str, list[int]], alpha: float | None) -> dict[str, Tensor]:
    """The tensors of a file with these shapes; lengths of DoRA are above 0, and factors have the side of their size."""
    tensors = {} if alpha is None else {"alpha": torch.tensor(alpha)}
    for i, (name, shape) in enumerate(sorted(shapes.items())):
        values = fill(torch.empty(shape), 10.0 + i)
        tensors[name] = values.abs() + 1 if name == "dora_scale" else values
    if "on_input" in tensors:
        tensors["on_input"] = torch.tensor(int(tensors["weight"].numel() == 12))
    return tensors


def run_lycoris(case: LycorisCase) -> dict[str, Any]:
    """What LyCORIS has in a file for the case, and what its layer gives: one case of the stored values."""
    from lycoris.modules.norms import NormModule  # pyright: ignore[reportMissingImports]
    from lycoris.wrapper import network_module_dict  # pyright: ignore[reportMissingImports]

    layer = make_layer(case)
    if case.algo == "norm":
        module: Any = NormModule("x", layer)
    else:
        module = network_module_dict[case.algo]("x", layer, 1.0, case.rank, 1.5, **case.options)
    state = module.state_dict()
    shapes = {name: list(tensor.shape) for name, tensor in state.items() if name != "alpha"}
    alpha = float(state["alpha"]) if "alpha" in state else None
    names = {"weight": "diff", "bias": "diff_b"} if case.algo == "full" else {}
    tensors = fill_tensors(shapes, alpha)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(tensors[names.get(name, name)])
        module.apply_to()
        output = layer(make_input(case))
    return {"shapes": shapes, "alpha": alpha, "output": [round(float(value), 7) for value in output.flatten()[:60]]}
