"""Tags and captions of a metadata file, tidied: conflicting and repeated tags go, and words that captioners overuse."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from sfumato.common.files import check_file_writable
from sfumato.tools.caption_output import MetadataFile, read_metadata_entries

FACE = "^_^"
RATING = "rating"  # DeepDanbooru's last tag begins so
SEVERAL_PEOPLE = ("girls", "boys")
LENGTHS = r"(?:long|short|medium) hair"
# Where an image has several people, several tags of one such kind say nothing of any of them.
CONFLICTS = (
    LENGTHS,
    r"(?:bob|hime) cut",
    r"[\w-]+ eyes",
    r"[\w-]+ sleeves|sleeveless",
    r"ponytail|braid|ahoge|twintails|sidelocks|two side up|two tails|(?:single (?:hair|side)|[\w-]+) bun|[\w-]+ braid",
    rf"(?!{LENGTHS})[\w-]+ hair",
)
CAPTION_WORDS = (  # in this order: what stands for a person in drawings, in the words of captioners
    (r"\banime anime\b", "anime"),
    (r"\byoung ", ""),
    (r"\b(?:cartoon|anime) (?:girl|female|lady|character|woman)\b", "girl"),
    (r"\b(?:cartoon|anime) (?:boy|male|man)\b", "boy"),
    (r"\b(?:cartoon|anime) couple\b", "couple"),
    (r"\b(?:cartoon|anime)(?: (?:style|art|illustration))? of\b", "illustration of"),
    (r"\bwomen\b", "girls"),
    (r"\bwoman\b", "girl"),
    (r"\bgirl girl\b", "girl"),
)


def clean_metadata(source: Path, target: Path) -> int:
    """Clean the tags and the captions of every entry; gives how many entries changed."""
    check_file_writable(target, option="the metadata file")
    entries, changed = read_metadata_entries(source), 0
    for entry in entries.values():
        before = dict(entry)
        for name, clean in (("tags", clean_tags), ("caption", clean_caption)):
            if isinstance(entry.get(name), str):
                entry[name] = clean(entry[name])
        changed += entry != before
    MetadataFile(path=target, name="tags", entries=entries).close()
    return changed


def clean_tags(text: str) -> str:
    tags = [tag.strip() if tag.strip() == FACE else tag.replace("_", " ").strip() for tag in text.split(",")]
    tags = [tag for tag in cut_rating(tags) if tag]
    if any(word in tag.split() or word in tag for tag in tags for word in SEVERAL_PEOPLE):
        tags = remove_conflicts(tags)
    return ", ".join(remove_parts(tags))


def cut_rating(tags: Sequence[str]) -> Sequence[str]:
    """The tags before DeepDanbooru's rating, which comes last."""
    places = [i for i, tag in enumerate(tags) if tag.startswith(RATING)]
    return tags[: places[0]] if places else tags


def remove_conflicts(tags: Sequence[str]) -> list[str]:
    kept = list(tags)
    for pattern in CONFLICTS:
        matching = [tag for tag in kept if re.fullmatch(pattern, tag)]
        if len(matching) > 1:
            kept = [tag for tag in kept if tag not in matching]
    return kept


def remove_parts(tags: Sequence[str]) -> list[str]:
    """Without tags of one word that a longer tag ends with: `shirt` where there is `white shirt`."""
    ends = {tag.rpartition(" ")[2] for tag in tags if " " in tag}
    return [tag for tag in dict.fromkeys(tags) if tag not in ends]


def clean_caption(text: str) -> str:
    for pattern, instead in CAPTION_WORDS:
        text = re.sub(pattern, instead, text)
    return text
