"""One file a corpus, each from its published layout to rows; `folder.py` reads your own speech."""
