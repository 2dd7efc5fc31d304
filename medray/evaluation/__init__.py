"""REPORT: masks against the truth in figures, tables and pages."""
