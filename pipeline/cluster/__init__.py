"""Runs that leave the working tree alone, and what machines share."""
