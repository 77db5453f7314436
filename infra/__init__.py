"""What the pipeline runs on: servers, images, manifests."""
