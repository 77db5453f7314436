"""Meta-gradients, and the learner that evaluation scores and serving runs."""
