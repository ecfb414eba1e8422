"""The page of all options."""

from __future__ import annotations

from compat.helpers import ROOT, THEIR_OPTIONS
from sfumato.compat.table import describe_status, render_options_page
from sfumato.config.schema import vocabulary


def test_the_page_of_options_is_up_to_date():
    page = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
    assert page == render_options_page(), "run: python -m sfumato.compat.table > docs/options.md"


# What options wait for, in the page's words; everything else works, or says why it need not.
TO_COME = (
    "block swap", "the fused backward pass", "DeepSpeed", "compiling", "the other adapters",
    "float16 training",
)  # fmt: skip


def test_every_option_works_or_says_why_not():
    begins = ("no effect: ", *(f"later: {feature}" for feature in TO_COME))
    for option in vocabulary().values():
        status = describe_status(option)
        assert status == "yes" or status.startswith(begins), option.name


def test_the_page_holds_every_option_of_sd_scripts():
    page = render_options_page()
    for name in set().union(*THEIR_OPTIONS.values(), vocabulary()):
        assert f"`--{name}`" in page
