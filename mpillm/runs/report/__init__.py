"""The run as one HTML file."""
