from .crops import read_crop as read_crop
from .recipe import Recipe as Recipe
from .recipe_files import find_slide_recipe as find_slide_recipe
from .recipe_files import list_recipes as list_recipes
from .train_model import train as train
from .tune_model import tune as tune
