"""The worker processes of a run on Ray, and the actor that holds their status."""
