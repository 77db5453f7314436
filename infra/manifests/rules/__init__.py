"""What no schema says. Each rule is a pure function: documents in, findings out."""
