"""Published ways to compare methods: over shots, over seeds, and from one data set to others."""
