"""Faults done for real: processes killed, disks filled, servers stopped."""
