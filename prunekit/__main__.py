"""`python -m prunekit` is the command `prunekit`."""

from prunekit.cli.group import main

if __name__ == "__main__":
    main()
