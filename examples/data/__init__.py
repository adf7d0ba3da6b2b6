"""Data for the examples: text to token files and back, images from folders and WebDataset tars."""
