"""Ray, the command line and cluster templates; no stage logic."""
