"""Raw examples in, sharded Arrow out; memory-mapped reading."""
