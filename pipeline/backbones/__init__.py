"""SEAM: feature extractors."""
