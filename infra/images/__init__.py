"""The container images: what is in them, their locks, and their bills of materials."""
