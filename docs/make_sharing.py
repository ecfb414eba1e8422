"""Write the table of docs/many_gpus.md, what does not go together with shared-out weights: `make pages`."""

from __future__ import annotations

from pathlib import Path

from sfumato.methods.sharing_rules import format_sharing_table

PAGE = Path(__file__).with_name("many_gpus.md")
BEGIN, END = "<!-- sharing: begin -->\n", "<!-- sharing: end -->\n"


def make_page(text: str) -> str:
    """The page with the table as it is now."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n" + "\n".join(format_sharing_table()) + f"\n\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(make_page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
