"""The command `lowbit`: one command a file, each importing what it needs when it runs, so that `--help` is quick."""
