"""What is measured side by side, each filled to the same length and asked for one step at a time."""
