"""Captioned pictures -> hashtags -> noun synsets -> shards of images, labels and repeat factors."""
