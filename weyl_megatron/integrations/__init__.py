"""The doors through which engines reach AdamW2."""
