"""Ray clusters: connecting to one, jobs on one, the files that start one."""
