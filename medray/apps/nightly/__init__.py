"""Nightly runs: what is new in an inbox becomes masks, a report and a summary."""
