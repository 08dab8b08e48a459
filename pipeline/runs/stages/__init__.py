"""The stages of a run, one file each: what names its output, what it reads, how it is run."""
