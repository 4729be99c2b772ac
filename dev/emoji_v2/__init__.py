"""Parts of `dev.build_emoji_v2`."""
