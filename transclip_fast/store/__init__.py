"""On-disk formats: input is checked, and output appears whole or not at all."""
