"""What a model costs on a cluster before anybody pays for it: does it fit, how fast, how much, in which layout."""
