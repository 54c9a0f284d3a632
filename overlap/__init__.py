"""Operation lists with yield points and their executors. Generic: runs callables, knows no model."""
