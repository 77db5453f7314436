"""SEAM: a raw data set as (example, class, group, split)."""
