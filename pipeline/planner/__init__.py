"""What a run takes, before it is run: memory, traffic, seconds of a step."""
