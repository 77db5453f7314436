"""What every package may use; it uses none of them."""
