"""The model: a decoder whose feed-forward layers may be mixtures of experts."""
