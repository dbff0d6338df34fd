"""What went wrong, out of logged metrics."""
