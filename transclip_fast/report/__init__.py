"""A result for people: a page for the browser, and which images to correct first."""
