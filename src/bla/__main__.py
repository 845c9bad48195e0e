"""`python -m bla` is the command."""

from bla.cli import main

if __name__ == "__main__":
    main()
