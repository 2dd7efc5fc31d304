"""Architectures, losses, the model folder, prediction; no Ray and no zarr here."""
