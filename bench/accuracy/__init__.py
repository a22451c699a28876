"""What the parts of the method, heads and prompts do to labels."""
