"""Audio tasks."""
