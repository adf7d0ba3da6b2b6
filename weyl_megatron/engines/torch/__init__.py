"""PyTorch itself: how it finds AdamW2, and parameters that no other engine holds."""
