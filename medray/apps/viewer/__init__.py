"""A run as pages in a browser."""
