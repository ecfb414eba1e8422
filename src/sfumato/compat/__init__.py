"""sd-scripts' scripts by their names, as other spellings of our commands."""
