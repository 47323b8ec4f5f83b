"""Training: data, optimizer, loop, run states, screen."""
