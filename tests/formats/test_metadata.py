"""The metadata of an adapter file: sd-scripts' keys and spellings, and nothing private."""

import json
import re
import time
from pathlib import Path

import pytest
from PIL import Image

from sfumato import __version__
from sfumato.common.text import strip_paths
from sfumato.config import (
    Config,
    ImageOptions,
    LossOptions,
    MemoryOptions,
    MetadataOptions,
    ModelOptions,
    NetworkOptions,
    NoiseOptions,
    OptimOptions,
    SaveOptions,
)
from sfumato.errors import UserError
from sfumato.formats.hashes import calculate_model_hash, calculate_sha256
from sfumato.formats.metadata import (
    TrainingFacts,
    add_save_facts,
    describe_file,
    describe_files,
    keep_minimum,
    make_adapter_metadata,
    make_modelspec,
    make_training_metadata,
)

GOLDEN = json.loads((Path(__file__).parents[1] / "goldens" / "metadata_keys.json").read_text())
WHEN = GOLDEN["when"]
DATA = {
    *WHEN["only with --dataset_config"],
    *WHEN["only without --dataset_config"],
    *(f"ss_num_{name}" for name in ("train_images", "validation_images", "reg_images", "batches_per_epoch")),
}
MODEL = {f"ss_{name}" for kind in ("sd_model", "vae") for name in (f"{kind}_name", f"{kind}_hash", f"new_{kind}_hash")}


def facts(**changes):
    return TrainingFacts(
        **{
            "session_id": 123,
            "started_at": 1700000000.75,
            "total_steps": 1600,
            "epochs": 10,
            "base_model_version": "sd_v1",
            "optimizer": "torch.optim.adamw.AdamW(weight_decay=0.1)",
            "data": {},
            "family": {},
            "method": {},
        }
        | changes
    )


def make_metadata(config, **changes):
    """The ss_ keys of an adapter file."""
    return make_training_metadata(config, facts(method=make_adapter_metadata(config), **changes))


# ---------------------------------------------------------------- ss_ keys


def test_the_keys_are_those_of_the_reference_trainer():
    data, model = dict.fromkeys(DATA), dict.fromkeys(MODEL, "")
    plain = make_metadata(Config(), data=data) | model
    assert set(plain) == set(GOLDEN["train_network_keys"]) - set(WHEN["at save"]) - {"ss_network_args"}
    given = Config(network=NetworkOptions(network_args={"conv_dim": 4}))
    full = add_save_facts(make_metadata(given, data=data) | model, step=1600, epoch=10)
    assert set(full) == set(GOLDEN["train_network_keys"])
    assert len(full) == GOLDEN["keys_count"]
    assert all(isinstance(value, str) for value in full.values())


def test_values_are_spelled_as_python_spells_them():
    config = Config(
        optim=OptimOptions(learning_rate=1e-4, text_encoder_lr=(1e-5, 1e-5), unet_lr=None, lr_warmup_steps=0.1),
        memory=MemoryOptions(gradient_checkpointing=True),
        loss=LossOptions(debiased_estimation_loss=True),
        images=ImageOptions(face_crop_aug_range=(2.0, 4.0)),
    )
    data = {"ss_resolution": "(512, 512)", "ss_bucket_info": None, "ss_dataset_dirs": {"a": {"n_repeats": 2}}}
    found = make_metadata(config, data=data, family={"ss_mode_scale": 1.29})
    assert {name: found[name] for name in found if name in EXPECTED} == EXPECTED


EXPECTED = {
    "ss_session_id": "123",
    "ss_training_started_at": "1700000000.75",
    "ss_learning_rate": "0.0001",
    "ss_text_encoder_lr": "[1e-05, 1e-05]",
    "ss_unet_lr": "None",
    "ss_lr_warmup_steps": "0.1",
    "ss_gradient_checkpointing": "True",
    "ss_full_fp16": "False",
    "ss_debiased_estimation": "True",
    "ss_max_train_steps": "1600",
    "ss_face_crop_aug_range": "(2.0, 4.0)",
    "ss_network_module": "networks.lora",
    "ss_network_alpha": "1.0",
    "ss_optimizer": "torch.optim.adamw.AdamW(weight_decay=0.1)",
    "ss_sd_scripts_commit_hash": f"sfumato {__version__}",
    "ss_resolution": "(512, 512)",
    "ss_bucket_info": "null",
    "ss_dataset_dirs": '{"a": {"n_repeats": 2}}',
    "ss_mode_scale": "1.29",
    "ss_noise_offset": "None",
}


def test_network_arguments_are_a_table_of_texts():
    network = NetworkOptions(network_args={"conv_dim": 4, "flag": True, "name": "x"}, network_dropout=0.25)
    found = make_metadata(Config(network=network))
    expected = {"conv_dim": "4", "flag": "True", "name": "x", "dropout": "0.25"}
    assert json.loads(found["ss_network_args"]) == expected


def test_facts_of_a_save_and_the_minimum():
    metadata = make_metadata(Config(network=NetworkOptions(network_args={"conv_dim": 4})))
    saved = add_save_facts(metadata, step=40, epoch=2)
    assert (saved["ss_steps"], saved["ss_epoch"]) == ("40", "2")
    assert abs(float(saved["ss_training_finished_at"]) - time.time()) < 60
    assert set(keep_minimum(saved)) == set(WHEN["minimum kept with --no_metadata"])
    assert keep_minimum(saved).items() <= saved.items()
    assert "ss_network_args" not in keep_minimum(make_metadata(Config()))


def test_files_are_described(tmp_path):
    path = tmp_path / "base.safetensors"
    path.write_bytes(b"abc")
    expected = {
        "ss_vae_name": "base.safetensors",
        "ss_vae_hash": calculate_model_hash(path),
        "ss_new_vae_hash": calculate_sha256(path),
    }
    assert describe_file("vae", str(path)) == expected
    assert describe_file("sd_model", tmp_path)["ss_sd_model_name"] == tmp_path.name
    assert describe_file("sd_model", "someone/some-model") == {"ss_sd_model_name": "someone/some-model"}
    assert describe_file("sd_model", tmp_path / "gone.ckpt") == {"ss_sd_model_name": "gone.ckpt"}
    assert describe_file("vae", None) == {}


# ---------------------------------------------------------------- model spec

RENAMED = {"output_name", "resolution", "min_timestep", "max_timestep", "clip_skip", "v2", "v_parameterization"}


def flows(architecture):
    """Models of this kind predict a velocity, whatever the golden says (quirks: they are marked epsilon)."""
    return not architecture.startswith("stable-diffusion-") or architecture.startswith("stable-diffusion-3")


@pytest.fixture
def at_the_goldens_time(monkeypatch):
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    localtime, strftime = time.gmtime(1700000000), time.strftime
    monkeypatch.setattr(time, "strftime", lambda form: strftime(form, localtime))
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.parametrize("case", GOLDEN["modelspec_cases"]["cases"], ids=lambda case: case["case"])
def test_the_model_spec_is_the_goldens(case, at_the_goldens_time):
    arguments, expected = case["args"], dict(case["metadata"])
    name = arguments.get("output_name", "out") or expected["modelspec.title"]
    config = Config(
        save=SaveOptions(output_name=name),
        noise=NoiseOptions(**{k: v for k, v in arguments.items() if k in ("min_timestep", "max_timestep")}),
        model=ModelOptions(clip_skip=arguments.get("clip_skip")),
        metadata=MetadataOptions(**{k: v for k, v in arguments.items() if k.startswith("metadata_")}),
    )
    assert set(arguments) <= RENAMED | {key for key in arguments if key.startswith("metadata_")}
    architecture = expected["modelspec.architecture"]
    predicts = "" if flows(architecture) else expected["modelspec.prediction_type"]
    width, height = map(int, expected["modelspec.resolution"].split("x"))
    found = make_modelspec(
        config,
        architecture=architecture,
        implementation=expected["modelspec.implementation"],
        prediction_type=predicts,
        resolution=(width, height),
    )
    assert found.pop("modelspec.implementation_version") == f"sfumato {__version__}"
    expected.pop("modelspec.implementation_version")
    if flows(architecture):
        expected.pop("modelspec.prediction_type", None)
    if "dataclass version" in case["case"]:  # the golden's program loses six of the options there
        assert expected.items() <= found.items()
        assert all(found[f"modelspec.{k.removeprefix('metadata_')}"] == v for k, v in arguments.items() if "data_" in k)
    else:
        assert found == expected


def spec(**options):
    config = Config(metadata=MetadataOptions(**options))
    return make_modelspec(config, architecture="a", implementation="b", prediction_type="v", resolution=(8, 8))


def test_an_image_becomes_a_data_url_once(tmp_path):
    path = tmp_path / "thumb.png"
    Image.new("RGB", (2, 2)).save(path)
    url = spec(metadata_thumbnail=str(path))["modelspec.thumbnail"]
    assert url.startswith("data:image/png;base64,iVBOR")
    path.unlink()  # an image that is deleted during a long run does no harm
    assert spec(metadata_thumbnail=str(path))["modelspec.thumbnail"] == url


def test_a_missing_thumbnail_is_an_error_before_training(tmp_path):
    config = Config(metadata=MetadataOptions(metadata_thumbnail=str(tmp_path / "gone.png")))
    with pytest.raises(UserError, match=r"--metadata_thumbnail.*gone\.png") as error:
        make_metadata(config)
    assert error.value.code == "thumbnail-unreadable"


# ---------------------------------------------------------------- nothing private


@pytest.mark.parametrize(
    ("text", "public"),
    [
        ("/home/alice/x.safetensors", "x.safetensors"),
        ("/home/alice/my models/x.pt", "x.pt"),
        ("~/models/x.pt", "x.pt"),
        ("~bob/x.pt", "x.pt"),
        ("C:\\Users\\bob\\m.toml", "m.toml"),
        ("C:/Users/bob/m.toml", "m.toml"),
        ("\\\\server\\share\\m.toml", "m.toml"),
        ("file:///home/alice/x", "x"),
        ("m1, /data/alice/m2.safetensors", "m1, m2.safetensors"),
        ("a.B(preset='/home/alice/p.toml',b=(0.9, 0.99))", "a.B(preset='p.toml',b=(0.9, 0.99))"),
        ("['/home/alice/a', '/home/alice/b']", "['a', 'b']"),
        ("someone/some-model", "someone/some-model"),
        ("https://example.org/a/b", "https://example.org/a/b"),
        ("a cat / a dog", "a cat / a dog"),
        ("weight_decay=0.1,betas=(0.9, 0.99)", "weight_decay=0.1,betas=(0.9, 0.99)"),
        ("1/2", "1/2"),
        ("/", "/"),
        ("", ""),
    ],
)
def test_paths_are_reduced_to_names(text, public):
    assert strip_paths(text) == public


def test_no_canary_gets_out(tmp_path):
    """Every option that can hold a path or a secret holds one; none of them is in any value."""
    canary = "/home/canary-user/secret-place"
    config = Config(
        model=ModelOptions(pretrained_model_name_or_path=f"{canary}/m.safetensors", vae=f"{canary}/v.pt"),
        network=NetworkOptions(network_args={"preset": f"{canary}/p.toml", "more": [f"{canary}/q"]}),
        save=SaveOptions(output_dir=Path(canary), resume=Path(canary)),
        metadata=MetadataOptions(metadata_merged_from=f"a, {canary}/b.safetensors"),
    )
    metadata = make_training_metadata(config, facts(optimizer=f"a.B(path='{canary}/x')")) | describe_files(config.model)
    metadata |= make_modelspec(config, architecture="a", implementation="b", prediction_type="v", resolution=(8, 8))
    leaks = {name: value for name, value in metadata.items() if re.search("canary|secret", value)}
    assert leaks == {}
