"""`python -m rayft` is the command line."""

from rayft.cli import main

main()
