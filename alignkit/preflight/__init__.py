"""What can be known before any training; nothing here writes outside a temporary directory or uses the network."""
