"""The doors through which engines reach AdamW2, and the one through which a script leaves them."""
