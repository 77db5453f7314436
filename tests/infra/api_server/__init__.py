"""A small API server that behaves as kube-apiserver does for the kinds that Metaloom uses."""
