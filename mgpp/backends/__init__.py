"""Where the shards live: one file a training framework."""
