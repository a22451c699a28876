"""What trained the shipped demo."""
