"""MODEL: recipes, crops, losses and the loop that makes one."""
