"""Metaloom: from labelled examples to a served model that learns new classes from a handful of them."""

__version__ = "0.1.0"
