"""Fetching the published archives, with nothing but the standard library: it runs before anything is installed."""
