"""Other libraries use what is trained here, and train with what is mined here: one file each, imported when used."""
