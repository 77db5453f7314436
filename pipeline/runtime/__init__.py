"""The process: torch.distributed, checkpoints, tracking and logs."""
