"""Models of whole slides: features of tiles, and what labels of slides teach."""
