"""Many runs as one: which there are, how settings are chosen, what they leave."""
