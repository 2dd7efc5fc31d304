"""RUN: slides and models into masks, stitched and checked."""
