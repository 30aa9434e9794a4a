"""`python -m moefy`, which is also how torchrun starts the command line."""

from moefy.cli import main

main()
