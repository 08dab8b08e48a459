"""One run: its configuration, its stages and their keys, what it needs, what is wrong with it."""
