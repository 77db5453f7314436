"""What is served, how it is promoted and rolled back."""
