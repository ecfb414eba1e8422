"""--network_module and LyCORIS' arguments: the same layers, ranks and kinds as LyCORIS makes of them."""

from __future__ import annotations

from typing import Any

import pytest

from sfumato.config import NetworkOptions
from sfumato.errors import UserError
from sfumato.methods.adapter_modules import AdapterModule, read_adapter_module


def read(*, has_convolutions: bool = True, module: str = "lycoris.kohya", **options: Any) -> AdapterModule:
    network = NetworkOptions(network_module=module, **{"network_dim": 16, "network_alpha": 8.0, **options})
    return read_adapter_module(network, has_convolutions=has_convolutions, opt_ins=["train_t5xxl"])


def read_arguments(**arguments: Any) -> dict[str, Any]:
    return read(network_args=arguments).network.network_args


@pytest.mark.parametrize(("module", "arguments", "kind"), [
    ("networks.lora", {}, "lora"), ("networks.lokr", {}, "lokr"), ("lycoris.kohya", {}, "lora"),
    ("lycoris.kohya", {"algo": "LoKr"}, "lokr"), ("networks.loha", {}, "loha"),
    ("lycoris.kohya", {"algo": "loha"}, "loha"), ("lycoris.kohya", {"algo": "full"}, "full_difference"),
    ("lycoris.kohya", {"algo": "ia3"}, "ia3"), ("lycoris.kohya", {"algo": "GLoRA"}, "glora"),
    ("lycoris.locon", {"algo": "locon"}, "lora"),
    ("locon.locon_kohya", {"algo": None}, "lora"),
])  # fmt: skip
def test_kinds(module: str, arguments: dict[str, Any], kind: str) -> None:
    assert read(module=module, network_args=arguments).adapter_kind == kind


def test_convolutions_have_the_rank_of_linear_layers_unless_they_have_their_own() -> None:
    assert read_arguments() == {"conv_dim": 16, "conv_alpha": 8.0}
    assert read_arguments(conv_dim=0) == {"conv_dim": 16, "conv_alpha": 8.0}
    assert read_arguments(conv_dim=4, conv_alpha=2) == {"conv_dim": 4, "conv_alpha": 2}
    for options in ({"network_args": {"preset": "attn-mlp"}}, {"network_train_text_encoder_only": True}):
        assert "conv_dim" not in read(**options).network.network_args
    assert read(has_convolutions=False).network.network_args == {}


def test_convolutions_that_no_model_or_preset_has_are_noted() -> None:
    arguments = {"conv_dim": 4, "conv_alpha": 1}
    for found in (
        read(has_convolutions=False, network_args=arguments), read(network_args={**arguments, "preset": "attn-only"}),
    ):  # fmt: skip
        assert "conv_dim and conv_alpha" in found.notes[0]
        assert found.network.network_args == {}


def test_dropout_is_the_argument_or_the_option() -> None:
    assert read(network_args={"dropout": 0.25}, network_dropout=0.5).network.network_dropout == 0.25
    assert read(network_dropout=0.5).network.network_dropout == 0.5
    assert read(network_args={"dropout": 0}).network.network_dropout is None


def test_a_preset_without_text_encoders() -> None:
    assert read(network_args={"preset": "unet-only"}).network.network_train_unet_only
    assert not read().network.network_train_unet_only


@pytest.mark.parametrize("argument", [
    {"use_tucker": False}, {"use_cp": False}, {"use_conv_cp": False}, {"disable_conv_cp": True},
    {"train_norm": False}, {"train_on_input": True}, {"bypass_mode": True}, {"block_size": 4}, {"constraint": 1},
    {"constrain": 1}, {"rescaled": True}, {"factor": 8}, {"full_matrix": True},
    {"decompose_both": True}, {"unbalanced_factorization": True}, {"train_t5xxl": False}, {"train_llm_adapter": False},
])  # fmt: skip
def test_what_changes_nothing_of_a_lora_is_taken_quietly(argument: dict[str, Any]) -> None:
    arguments = read_arguments(**argument)
    assert {name: value for name, value in arguments.items() if name != "train_t5xxl"} == read_arguments()


def test_what_counts_is_kept() -> None:
    arguments = {"algo": "lokr", "factor": 8, "decompose_both": True, "dora_wd": True, "wd_on_output": False,
                 "rank_dropout": 0.1, "module_dropout": 0.2, "loraplus_lr_ratio": 16, "train_t5xxl": True}  # fmt: skip
    expected = {name: value for name, value in arguments.items() if name != "algo"}
    assert expected.items() <= read_arguments(**arguments).items()
    for tucker in ({"use_tucker": True}, {"use_cp": True}, {"disable_conv_cp": False}):
        assert all(read_arguments(algo=algo, **tucker)["use_tucker"] is True for algo in ("lokr", "locon"))


@pytest.mark.parametrize("module", ["networks.lora", "lycoris.kohya"])
def test_use_tucker_without_convolutions_is_noted(module: str) -> None:
    notes = read(module=module, network_args={"use_tucker": True}, has_convolutions=False).notes
    assert [note for note in notes if "use_tucker" in note]


@pytest.mark.parametrize("algo", ["full", "ia3", "glora"])
def test_a_form_that_a_kind_does_not_have_is_noted(algo: str) -> None:
    found = read(network_args={"algo": algo, "dora_wd": True, "wd_on_output": True, "use_tucker": True})
    assert ["dora_wd" in note for note in found.notes if "wd" in note][:1] == [True]
    assert not {"dora_wd", "wd_on_output", "use_tucker"} & {*found.network.network_args}
    assert read(network_args={"algo": algo, "dora_wd": False}).notes == ()


def test_arguments_of_ranks_have_no_effect_without_them() -> None:
    assert "rank_stabilized" not in read_arguments(algo="ia3", rs_lora=True, use_scalar=True)
    assert read_arguments(algo="ia3", train_on_input=True)["train_on_input"] is True
    assert read_arguments(algo="glora", rs_lora=True)["rank_stabilized"] is True


@pytest.mark.parametrize(("arguments", "code"), [
    ({"algo": "lorka"}, "lycoris-algo-unknown"), ({"algo": "TLoRA"}, "lycoris-algo-refused"),
    ({"preset": "atn-mlp"}, "lycoris-preset-unknown"),
    ({"preset": "mine.toml"}, "lycoris-preset-missing"),
    ({"train_llm_adapter": True}, "lycoris-arg-of-other-model"),
])  # fmt: skip
def test_what_would_give_another_result_is_refused(arguments: dict[str, Any], code: str) -> None:
    with pytest.raises(UserError) as error:
        read_arguments(**arguments)
    assert error.value.code == code
