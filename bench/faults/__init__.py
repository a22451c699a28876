"""Every file operation of every command fails once."""
