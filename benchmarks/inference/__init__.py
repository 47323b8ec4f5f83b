"""What the benchmarks of inference share: peers, models for them, sides that take turns, and the machine's limits."""
