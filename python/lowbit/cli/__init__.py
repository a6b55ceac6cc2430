"""The command `lowbit`: one command a file, each importing what it needs when it runs: `--help` is quick."""
