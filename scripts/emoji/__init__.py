"""Parts of the embedded emoji data set's builder; see `scripts/build_emoji.py`."""
