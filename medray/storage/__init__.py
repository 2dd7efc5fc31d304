"""OME-Zarr, parquet and plain files, in and out; knows nothing of Ray or torch."""
