"""Parts of the embedded emoji data set's builder; see `dev/build_emoji.py`."""
