"""The one place that talks to Kubernetes."""
