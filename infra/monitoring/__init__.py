"""Alerts and a dashboard for what the service tells Prometheus."""
