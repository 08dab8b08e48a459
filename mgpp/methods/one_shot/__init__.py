"""Methods that prune once and train nothing."""
