"""`python -m transclip_fast.cli`, the same as `transclip-fast`."""

from transclip_fast.cli import main

main()
