"""The commands of `medray`: the options of each, and the one function that it calls."""
