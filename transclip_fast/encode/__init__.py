"""Images and class names to unit features, by any open_clip model."""
