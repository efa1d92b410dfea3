"""The error prior, and how it is profiled."""
