"""Arrays in: checks, and rows in memory or in files."""
