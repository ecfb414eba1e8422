"""`sfumato dataset edit`: everything from the dataset to the end of the server."""

from __future__ import annotations

import hashlib
import re
import sys
import webbrowser
from pathlib import Path

from sfumato.common.files import remove_leftovers
from sfumato.common.text import plural
from sfumato.config import Config
from sfumato.data.find.index import cache_folder
from sfumato.tools.caption_tokens import load_tokenizers
from sfumato.tools.editor.server import EditorServer, make_token, open_listener
from sfumato.tools.editor.session import EditSession
from sfumato.tools.editor.sources import EditedDataset, find_edited_dataset
from sfumato.tools.editor.thumbnails import ThumbnailCache
from sfumato.tools.editor.token_counts import TokenCounter


def edit_dataset(config: Config, *, port: int, open_browser: bool) -> None:
    """Serve the page until Ctrl-C."""
    dataset = find_edited_dataset(config)
    for folder, extension in {(image.caption.parent, image.caption.suffix) for image in dataset.images}:
        remove_leftovers(folder, rf".*{re.escape(extension)}")
    tokens = TokenCounter(lambda: load_tokenizers(config), weighted=config.captions.weighted_captions)
    session = EditSession(dataset, tokens)
    thumbnails = ThumbnailCache(dataset.images, get_thumbnail_folder(config, dataset), session.add_image_fault)
    server = EditorServer(session=session, thumbnails=thumbnails, token=make_token())
    listener = open_listener(server, port)
    address = f"http://{listener.server_address[0]}:{listener.server_address[1]}/{server.token}/"
    sys.stdout.write(f"{plural(len(dataset.images), 'image')} of {dataset.title}\n")
    for note in dataset.notes:
        sys.stdout.write(f"note: {note}\n")
    sys.stdout.write(f"open {address}\nCtrl-C ends it; what is saved in the page is saved on disk\n")
    sys.stdout.flush()
    tokens.start(session.update_tokens)
    thumbnails.start(config.loader.workers)
    if open_browser:
        webbrowser.open(address)
    try:
        server.run(listener)
    except KeyboardInterrupt:  # the way to end it
        thumbnails.stop()  # first, since its workers note faults in the session
        tokens.stop()
        session.stop_writing()
        count = len({change.number for step in session.history.past for change in step.changes})
        sys.stdout.write(f"\ncaptions changed: {count:,}\n")


def get_thumbnail_folder(config: Config, dataset: EditedDataset) -> Path:
    name = hashlib.blake2b(str(Path(dataset.title).absolute()).encode(errors="surrogatepass"), digest_size=8)
    return cache_folder(config) / "thumbnails" / name.hexdigest()
