"""Models on disk: saved states of a run, Hugging Face directories in and out."""
