"""Are the manifests of infra/kubernetes right? `python -m infra.manifests` says."""
