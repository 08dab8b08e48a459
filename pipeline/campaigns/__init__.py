"""Many runs compared: which there are, how settings are chosen, what they leave."""
