"""The commands of `medray`, generated from the functions that they call."""
