"""Spreading a finished model over the ranks of torch.distributed, from outside."""
