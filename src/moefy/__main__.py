"""`python -m moefy`, which is also how torchrun starts the command line."""

from moefy.cli import main

if __name__ == "__main__":
    main()
