"""On-disk formats: what is read is checked, what is written appears whole or not at all."""
