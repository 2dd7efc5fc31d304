"""DATASET: slides and annotations, or folders of images, into what training reads."""
