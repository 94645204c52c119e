"""What networks are built of: each block gives its output and the step back to its input."""
