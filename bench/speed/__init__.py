"""Time and memory of solves, searches and encoding."""
