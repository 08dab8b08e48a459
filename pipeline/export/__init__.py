"""What a run hands over: a checkpoint that others load, and its model card."""
