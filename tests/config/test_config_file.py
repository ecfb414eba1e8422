"""The configuration file: free sections, what is ignored and named, and values whose meaning is certain."""

from __future__ import annotations

import pytest

from sfumato.common.foreign_keys import foreign_kinds
from sfumato.config import load_config
from sfumato.config.schema import vocabulary
from sfumato.errors import SeveralErrors, UserError


def test_sections_are_free(load, write):
    config = load(write('seed = 1\n[anything]\nnetwork_dim = 8\n["two words"]\nnetwork_args = ["conv_dim=4"]\n'))
    assert (config.loop.seed, config.network.network_dim, config.network.network_args) == (1, 8, {"conv_dim": 4})
    assert config.sources["network_dim"] == "run.toml"


def test_types_come_from_toml(load, write):
    config = load(
        write(
            "learning_rate = 1\ntext_encoder_lr = 1e-4\nlr_warmup_steps = 0.1\nlr_scheduler = 'cosine'\n"
            "resolution = [512, 768]\ncache_latents = true\nmax_train_steps = 10\nvae = 'some/vae'\n"
        )
    )
    assert config.optim.learning_rate == 1.0
    assert config.optim.text_encoder_lr == (1e-4,)
    assert config.optim.lr_warmup_steps == 0.1
    assert config.cache.cache_latents
    assert config.model.vae == "some/vae"


def test_the_ending_is_added(load, write, tmp_path):
    write("seed = 3")
    assert load(f"--config_file {tmp_path / 'run'}").loop.seed == 3


def test_a_byte_order_mark_is_skipped(load, tmp_path):
    (tmp_path / "run.toml").write_bytes(b"\xef\xbb\xbfseed = 3\r\ncaption_prefix = 'fa\xc3\xa7ade'\r\n")
    config = load(f"--config_file {tmp_path / 'run.toml'}")
    assert (config.loop.seed, config.captions.caption_prefix) == (3, "façade")


@pytest.mark.parametrize(
    ("text", "code", "value"),
    [
        ("network_dmi = 8", "config-key-misspelled", "run.toml:1: network_dmi is not an option — did you"),
        ("[a]\n\nnetwork_di = 8", "config-key-misspelled", "run.toml:3: network_di"),
        ("Network-Dim = 8", "config-key-misspelled", "did you mean network_dim?"),
        ("caption_extentoin = '.a'", "config-key-misspelled", "did you mean caption_extension?"),
        ("seed = 1\nseed = 2", "config-file-invalid-toml", "a key is given twice (at line 2"),
        ("[a]\n[a]", "config-file-invalid-toml", "a section is given twice"),
        ("seed = 'x'", "option-type-wrong", "run.toml:1: seed: 'x'"),
        ("seed = 1.5", "option-type-wrong", "run.toml:1: seed: 1.5"),
        ("seed = '1.5'", "option-type-wrong", "run.toml:1: seed: '1.5'"),
        ("seed = [1, 2]", "option-type-wrong", "run.toml:1: seed: [1, 2]"),
        ("seed = true", "option-type-wrong", "run.toml:1: seed: True"),
        ("network_dim = 8.5", "option-type-wrong", "run.toml:1: network_dim: 8.5"),
        ("max_token_length = 200", "option-choice-unknown", "run.toml:1: max_token_length: 200"),
        ("learning_rate = true", "option-type-wrong", "run.toml:1: learning_rate: True"),
        ("cache_latents = 'maybe'", "option-type-wrong", "run.toml:1: cache_latents: 'maybe'"),
        ("cache_latents = 2", "option-type-wrong", "run.toml:1: cache_latents: 2"),
        ("output_name = true", "option-type-wrong", "run.toml:1: output_name: True"),
        ("network_args = 4", "option-value-malformed", "run.toml:1: network_args: has '4'"),
        ("lr_scheduler = 'cosin'", "option-choice-unknown", "run.toml:1: lr_scheduler: 'cosin' is not one of constant"),
        ("[[datasets]]\nresolution = 5", "config-section-nested", "--dataset_config"),
        ("[a]\n[a.b]\nseed = 1", "config-section-nested", "run.toml:1: b "),
        ("[network_args.args]\nnetwork_dim = 1", "config-section-nested", "run.toml:1: args "),
        ('vae = "C:\\models\\x"', "config-file-invalid-toml", "write \\\\ for one backslash"),
        ("cache_latents = True", "config-file-invalid-toml", "true and false in lower case"),
        ("seed 1", "config-file-invalid-toml", "run.toml: "),
    ],
)
def test_faults_name_file_line_and_key(faults, codes_of, write, text, code, value):
    option = write(text)
    assert codes_of(option) == [code]
    assert value in faults(option)[0]


def test_a_file_that_is_not_utf8(faults, codes_of, tmp_path):
    (tmp_path / "run.toml").write_bytes("seed = 1\ncaption_prefix = 'façade'".encode("latin-1"))
    assert codes_of(f"--config_file {tmp_path / 'run.toml'}") == ["text-file-not-utf8"]
    assert "run.toml, line 2," in faults(f"--config_file {tmp_path / 'run.toml'}")[0]


def test_a_missing_file_is_the_only_fault(faults, codes_of, write, tmp_path):
    """It may hold what is required, so nothing else is reported as missing."""
    write("seed = 1")
    assert codes_of(f"--config_file {tmp_path / 'runn.toml'}") == ["config-file-missing"]
    assert faults(f"--config_file {tmp_path / 'runn.toml'}")[0].endswith(f"did you mean {tmp_path / 'run.toml'}?")


FOREIGN = "epoch = 1\nlowvram = true\nconv_dim = 4\nqwen3 = 'x'\nsomething_else = 3\nnum_repeats = 10\n"
FOREIGN += "config_file = 'other.toml'\noutput_config = false\nshiny = false\nempty = ''\n"


def test_keys_of_other_programs_are_named_in_one_line(load, write):
    (note,) = load(write(FOREIGN)).notes
    assert note.startswith("run.toml:")
    kinds = dict(part.split(": ") for part in note.partition(":")[2].strip().split("\n    "))
    assert kinds == {
        "ignored, of a front end or accelerate": "epoch, lowvram",
        "ignored, only in network_args": "conv_dim",
        "ignored, of other scripts": "qwen3",
        "ignored, unknown": "something_else",
        "ignored, only in the file of dataset_config": "num_repeats",
        "ignored, only on the command line": "config_file",
    }


def test_strict_refuses_each_of_them(codes_of, write):
    assert codes_of([write(FOREIGN), "--strict"]) == ["refused-by-strict"] * 7
    assert codes_of([write("seed = 1.0\nvae = ''\n[x]\nseed = '2'"), "--strict"]) == ["refused-by-strict"] * 4
    assert codes_of(write("strict = true\nepoch = 1")) == ["refused-by-strict"]
    assert not codes_of([write("seed = 1\nlowvram = false\nlr_scheduler_args = []\nflip_aug = false"), "--strict"])


def test_no_known_key_of_another_program_is_an_option():
    assert not foreign_kinds().keys() & vocabulary().keys()


def test_of_a_key_in_two_sections_the_last_counts(load, write):
    config = load(write("seed = 1\n[b]\nseed = 2\ncaption_extension = '.a'\n[c]\ncaption_extention = '.b'"))
    assert (config.loop.seed, config.captions.caption_extension) == (2, ".b")
    assert config.notes == ("run.toml: read, given again, the last counts: seed, caption_extension",)


def test_a_file_that_cannot_be_read_is_the_only_fault(tmp_path):
    """What is missing may well be in that file."""
    for name, text in (("run.toml", "seed 1"), ("run.json", "{"), ("run.toml", "seed = '\xff"), ("run.json", "[]")):
        (tmp_path / name).write_bytes(text.encode("latin-1"))
        with pytest.raises(UserError) as raised:
            load_config([f"--config_file={tmp_path / name}", "--resolution=512"])
        assert not isinstance(raised.value, SeveralErrors)


def test_a_section_called_like_an_option_with_arguments_holds_them(load, write):
    config = load(write("[optimizer_args]\nweight_decay = 0.1\n[network_args]\nnetwork_dim = 8"))
    assert config.optim.optimizer_args == {"weight_decay": 0.1}
    assert (config.network.network_dim, config.network.network_args) == (8, {})


def test_a_file_as_a_front_end_writes_it(load, write):
    """Defaults, 75 tokens, 1 for true, no compiler: all are accepted."""
    config = load(
        write(
            """
            bucket_no_upscale = true
            bucket_reso_steps = 64
            caption_extension = ".txt"
            clip_skip = 1
            dynamo_backend = "no"
            enable_bucket = true
            huber_c = 0.1
            huber_scale = 1
            huber_schedule = "snr"
            learning_rate = 0.0001
            loss_type = "l2"
            lr_scheduler = "cosine"
            lr_scheduler_args = []
            lr_scheduler_num_cycles = 1
            lr_scheduler_power = 1
            lr_warmup_steps = 160
            max_bucket_reso = 2048
            max_data_loader_n_workers = 0
            max_grad_norm = 1
            max_timestep = 1000
            max_token_length = 75
            max_train_steps = 1600
            mixed_precision = "bf16"
            multires_noise_discount = 0.3
            network_alpha = 1
            network_args = []
            network_module = "networks.lora"
            noise_offset_type = "Original"
            optimizer_args = []
            optimizer_type = "AdamW8bit"
            persistent_data_loader_workers = 1
            prior_loss_weight = 1
            resolution = "512,512"
            save_every_n_epochs = 1
            save_model_as = "safetensors"
            text_encoder_lr = [0.0001]
            train_batch_size = 1
            unet_lr = 0.0001
            vae_batch_size = 4
            wandb_run_name = "last"
            """
        )
    )
    assert config.model.max_token_length is None
    assert config.memory.compile_backend == "inductor"
    assert config.loader.persistent_data_loader_workers is True
    assert len(config.notes) == 2  # the front end's key; the name for wandb and threads that are always kept


def test_what_is_switched_off_or_empty_is_not_given(load, write):
    """Front ends write every option; neither counts as what the user says against a checkpoint."""
    config = load(write("v_parameterization = false\nvae = ''\nreport = false\nmin_snr_gamma = 0\nseed = 0"))
    assert "v_parameterization" not in config.model.model_fields_set
    assert config.model.vae is None
    assert config.log.report is False  # on by default, so this says something
    assert config.loss.min_snr_gamma is None
    assert config.loop.seed == 0  # a value like any other
    (note,) = config.notes
    assert all(word in note for word in ("run.toml", "vae", "min_snr_gamma"))
