"""Arrow store in, episodes out: pure in (seed, index)."""
