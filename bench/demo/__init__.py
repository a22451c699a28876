"""Training of the shipped demo."""
