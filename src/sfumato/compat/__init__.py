"""The scripts of the field by their names, as other spellings of our commands."""
