"""Loader, models, objectives, stages, trainer and checkpoints: a shard set -> a run folder."""
