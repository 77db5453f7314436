"""The service: learners made from a few examples, kept, and asked over HTTP."""
