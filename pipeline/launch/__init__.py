"""SEAM: start N workers of one entry."""
