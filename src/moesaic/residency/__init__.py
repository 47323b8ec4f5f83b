"""Where experts live when memory is short: on disk, with the ones that are used in a cache of fixed size."""
