"""Metaloom: labelled examples in, a served model that learns new classes from a handful out."""

__version__ = "0.1.0"
