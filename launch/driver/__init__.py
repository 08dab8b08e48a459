"""What runs on the driver: a run's stages in order, many runs, campaigns, who works on what."""
