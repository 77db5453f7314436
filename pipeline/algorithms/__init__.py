"""SEAM: few-shot learners as pure functions of (model, params, task)."""
