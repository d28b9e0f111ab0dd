"""`python -m memtail` is the command line."""

from memtail.cli.app import main

if __name__ == "__main__":
    main()
