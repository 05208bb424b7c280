"""Captioned pictures -> hashtags -> synsets -> a shard set on disk. Never imports torch."""
