"""Is this machine, and are all nodes together, ready to serve? Looked at before weights load."""
