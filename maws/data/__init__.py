"""From a shard set to batches: which samples a step sees, and how a sample becomes tensors."""
