"""Frozen episodes in; numbers with intervals, and pictures, out."""
