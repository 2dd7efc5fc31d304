"""Colours of stains, as optical densities: -ln(I / I0), by Beer and Lambert's law."""

from __future__ import annotations

import numpy as np

HED = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11], [0.27, 0.57, 0.78]])
"""Haematoxylin, eosin and DAB by row: densities of red, green and blue for one unit of
stain, not normalised (Ruifrok and Johnston 2001,
https://pubmed.ncbi.nlm.nih.gov/11531144)."""
