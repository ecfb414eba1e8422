"""Prompt files: against what sd-scripts makes of the same files and lines."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from sfumato.config.prompt_options import LINE_OPTIONS
from sfumato.config.prompts import SAMPLER_NAMES, Prompt, parse_line, read_prompts
from sfumato.errors import UserError

GOLDEN = json.loads((Path(__file__).parents[1] / "goldens" / "prompts.json").read_text())
# A line of options alone is a prompt there, and a tab hides an option.
# Options of gen_img are options of every prompt here.
WHERE_MORE_IS_READ = {
    "--w 512": {"width": 512}, "a cat --w\t64": {"width": 64}, "a cat --am 0.8": {"network_mul": (0.8,)},
    "a cat --rcfg 1 --ctr 1 --am 1,0.5": {"network_mul": (1.0, 0.5)},
    "a cat --nw 5 --nh 5": {"original_width_negative": 5, "original_height_negative": 5},
    "a cat --c clip --nl 2 --t 0.5 --ow 10 --oh 20": {
        "clip_prompt": "clip", "negative_scale": 2.0, "strength": 0.5, "original_width": 10, "original_height": 20,
    },
}  # fmt: skip
# Defects of the reference that are not repeated: the prompt's own first word was read as an option, the shift stayed
# a text, a mark at the start of a file hid its first comment, and files of other endings ended in a crash.
FIRST_WORDS = {
    "n foo bar", "w 512 house", "s 3 cats on a mat --w 64", "d 5", "h 20 m tall tower", "cn tower in toronto",
    "l 4 people", "g 2 things --g 3", "fs style",
}  # fmt: skip


def list_values(prompt: Prompt) -> dict[str, Any]:
    """What the file says, without defaults."""
    values = {field.name: getattr(prompt, field.name) for field in fields(prompt) if field.name != "notes"}
    return {name: value for name, value in values.items() if value not in (None, "", ())}


def reference_values(parsed: dict[str, Any]) -> dict[str, Any]:
    wanted = {name: value for name, value in parsed.items() if name != "enum"}
    if "flow_shift" in wanted:
        try:
            wanted["flow_shift"] = float(wanted["flow_shift"])
        except ValueError:
            del wanted["flow_shift"]
    return wanted


@pytest.mark.parametrize("row", GOLDEN["line_to_prompt_dict"], ids=lambda row: row["line"])
def test_lines(row: dict[str, Any]) -> None:
    line, wanted = row["line"], reference_values(row["parsed"])
    if line in FIRST_WORDS:
        _, *options = line.split(" --")
        names = [LINE_OPTIONS[option[0]].field.replace("seeds", "seed") for option in options]
        wanted = {"prompt": wanted["prompt"], **{name: wanted[name] for name in names}}
    wanted |= WHERE_MORE_IS_READ.get(line, {})
    if line == "--w 512":
        del wanted["prompt"]
    assert list_values(parse_line(line, where="here")) == wanted


@pytest.mark.parametrize("row", GOLDEN["load_prompts"], ids=lambda row: row["file"])
def test_files(row: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / row["file"]
    path.write_bytes(row["content"].encode())
    if row["file"] in ("nosubset.toml", "obj.json", "p.yaml", "p.prompt"):  # crashes there, errors here
        with pytest.raises(UserError) as error:
            read_prompts(path)
        assert error.value.code in ("prompt-file-without-subsets", "prompt-file-without-list", "prompt-file-suffix")
        return
    prompts = [list_values(prompt) for prompt in read_prompts(path)]
    special = {
        "override.toml": [{"prompt": "a", "width": 640}],
        "P.TXT": [{"prompt": "a cat"}],
        "bom.txt": [{"prompt": "a"}],
    }
    if row["file"] in special:
        assert prompts == special[row["file"]]
    else:
        known = {field.name for field in fields(Prompt)}
        for prompt, parsed in zip(prompts, row["parsed"], strict=True):
            values = reference_values(parsed)
            assert prompt == {name: values[name] for name in values if name in known}


@pytest.mark.parametrize(
    ("line", "note"),
    [
        ("a --d abc", "--d 'abc' is not a valid value"),
        ("a --fs abc", "--fs 'abc' is not a valid value"),
        ("a --n", "--n '' is not a valid value"),
        ("a --w 64 more", "of --w '64 more' only '64' is used"),
        ("a --x 3", "'--x 3' is not an option and is ignored"),
        ("a --w=64", "'--w=64' is not an option and is ignored (options are written ` --w 512`)"),
        ("a - b -- c", "'-- c' is not an option"),
    ],
)
def test_what_is_ignored_is_reported(line: str, note: str) -> None:
    (text,) = parse_line(line, where="file:3").notes
    assert text.startswith("file:3: ")
    assert note in text


def test_valid_options_give_no_notes() -> None:
    line = "a cat --n bad --W 64 --h 64 --d 1 --s 5000 --l 2 --g 3.5 --ss k_euler  --cn a b.png --ctr 1 --rcfg 1 --fs 3"
    prompt = parse_line(line, where="here")
    assert prompt.notes == ()
    assert (prompt.sample_steps, prompt.sample_sampler, prompt.controlnet_image) == (1000, "k_euler", "a b.png")


def test_a_bad_value_leaves_an_earlier_one() -> None:
    assert parse_line("a --w 64 --w x", where="here").width == 64


def test_an_unknown_key_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    path.write_text('[{"prompt": "a", "widht": 64}]')
    (prompt,) = read_prompts(path)
    assert "widht is not a key of a prompt and is ignored (did you mean 'width'?)" in prompt.notes[0]


@pytest.mark.parametrize(
    ("name", "content", "code", "value"),
    [
        ("a.toml", '[[prompt.subset]]\nprompt = "a"\nwidth = "64"', "prompt-value-wrong-type", "'64'"),
        ("a.toml", '[[prompt.subset]]\nprompt = "a"\nscale = nan', "prompt-value-not-finite", "scale"),
        ("a.json", '[{"prompt": "a", "scale": 1e999}]', "prompt-value-not-finite", "scale"),
        ("a.json", '[{"prompt": "a", "scale": 1' + "0" * 400 + "}]", "prompt-value-not-finite", "scale"),
        ("a.json", '[{"prompt": "a \\ud83d"}]', "prompt-not-utf8", "prompt"),
        ("a.json", "[" * 100_000, "prompt-file-invalid", "nested too deeply"),
        (
            "a.toml",
            '[[prompt.subset]]\nprompt = "a"\nseed = true',
            "prompt-value-wrong-type",
            "seed takes int, not True",
        ),
        ("a.toml", '[[prompt.subset]]\nprompt = "a"\nwidth = 0', "prompt-value-below-one", "width"),
        ("a.toml", "[prompt", "prompt-file-invalid", "a.toml: "),
        ("a.json", '[{"width": 3}]', "prompt-text-missing", "a.json[0]"),
        ("a.json", "[3]", "prompt-file-without-list", "a.json"),
        ("a.json", '[{"prompt": "a", "file_name": ".."}]', "prompt-file-name-invalid", "file_name '..'"),
        ("a.txt", "a cat --ss euler_b", "prompt-sampler-unknown", "'euler_b' — did you mean 'euler"),
    ],
)
def test_faults_name_file_and_entry(name: str, content: str, code: str, value: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError) as error:
        read_prompts(tmp_path / name)
    assert error.value.code == code
    assert value in str(error.value)
    assert name in str(error.value)


def test_the_option_offers_the_same_samplers() -> None:
    from sfumato.config.schema import vocabulary

    assert vocabulary()["sample_sampler"].choices == SAMPLER_NAMES


@pytest.mark.parametrize(
    ("line", "prompt", "size"),
    [
        ("a cat\t--w 64\t--h 32", "a cat", (64, 32)),
        ("a cat\u3000--w 64 --h  32", "a cat", (64, 32)),
        ("a cat \t --w\t64 --h 32", "a cat \t", (64, 32)),
        ("-- a cat --w 64 --h 32", "-- a cat", (64, 32)),
        ("--cat in a box", "--cat in a box", (None, None)),
    ],
)
def test_any_space_is_before_an_option(line: str, prompt: str, size: tuple[int | None, int | None]) -> None:
    found = parse_line(line, where="here")
    assert (found.prompt, (found.width, found.height), found.notes) == (prompt, size, ())


def test_a_line_of_options_alone_is_an_empty_prompt_and_is_noted(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("# first\na red box\n --w 384 --h 320 --d 5\n\t--n bad\n")
    box, sized, negative = read_prompts(path)
    assert (box.prompt, box.width, box.notes) == ("a red box", None, ())
    assert (sized.prompt, sized.width, sized.height, sized.seed, len(sized.notes)) == ("", 384, 320, 5, 1)
    assert (negative.prompt, negative.negative_prompt) == ("", "bad")
    assert f"{path}:3" in sized.notes[0]


@pytest.mark.parametrize("digits", ["18446744073709551616", "9" * 23, "9" * 5000])
def test_a_seed_beyond_64_bits_is_ignored_in_a_line_and_refused_elsewhere(tmp_path: Path, digits: str) -> None:
    prompt = parse_line(f"a box --d {digits} --w 64", where="here")
    assert (prompt.seed, prompt.width, len(prompt.notes)) == (None, 64, 1)
    if len(digits) > 4000:
        return
    for name, content in (
        ("p.json", f'[{{"prompt": "a", "seed": {digits}}}]'),
        ("p.toml", f'[[prompt.subset]]\nprompt = "a"\nseed = {digits}'),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError) as error:
            read_prompts(tmp_path / name)
        assert error.value.code == "prompt-seed-too-large"


def test_the_largest_seed_is_taken() -> None:
    assert parse_line("a --d 18446744073709551615", where="here").seed == 2**64 - 1


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.txt", ""), ("p.txt", "\n \r\n"), ("p.txt", "# a\n#b"), ("p.toml", ""), ("p.toml", "# a"),
        ("p.json", ""), ("p.json", "[]"),
    ],
)  # fmt: skip
def test_a_file_may_hold_no_prompt(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_bytes(content.encode())
    assert read_prompts(tmp_path / name) == []


def test_lines_end_as_in_any_program(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes("a\r\nb\rc\u2028d\ne".encode())
    assert [prompt.prompt for prompt in read_prompts(tmp_path / "p.txt")] == ["a", "b", "c\u2028d", "e"]


def test_a_size_of_too_many_digits_is_ignored_in_a_line_and_refused_elsewhere(tmp_path: Path) -> None:
    prompt = parse_line("a --w 99999999999999999999 --h 65536", where="here")
    assert (prompt.width, prompt.height, len(prompt.notes)) == (None, 65536, 1)
    (tmp_path / "p.json").write_text('[{"prompt": "a", "height": 65537}]')
    with pytest.raises(UserError) as error:
        read_prompts(tmp_path / "p.json")
    assert error.value.code == "prompt-size-too-large"
