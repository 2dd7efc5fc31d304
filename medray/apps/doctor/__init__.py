"""Checks of machines, clusters and storage: can they run medray?"""
