"""Label images that are noise."""

import numpy as np
from scipy import ndimage


def noise(height: int, width: int, seed: int, classes: int = 3) -> np.ndarray:
    rng = np.random.default_rng(seed)
    smooth = [
        ndimage.gaussian_filter(rng.normal(size=(height, width)), 1.5)
        for _ in range(classes)
    ]
    return np.argmax(smooth, axis=0).astype(np.uint8)
