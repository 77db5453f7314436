"""One retraining: what is new, a run of it, what the gate said, and a report."""
