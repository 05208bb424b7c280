"""Pure networks on timm and transformers: what enters and leaves, no loss, no config object, no device."""
